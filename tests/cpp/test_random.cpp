// SPDX-License-Identifier: Apache-2.0
// Random problems through every instruction set, against the contract in float64.
// Arguments: problems to solve (default 60), first seed (default 1).
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/engine.h"
#include "kernels/common/budget.h"
#include "kernels/common/sort_codes.h"
#include "tests/cpp/amx_modelled.h"
#include "tests/cpp/check.h"
#include "tests/cpp/problem.h"

using namespace visionpulse;
using problem::Problem;

namespace {

// Two ulp of the output type at a value of this size.
double two_ulp(DType dtype, double size) {
  const int digits = dtype == DType::kFloat32 ? 23 : dtype == DType::kBFloat16 ? 7 : 10;
  return size == 0.0 ? 0.0 : std::ldexp(1.0, std::ilogb(size) - digits + 1);
}

// Gives the op scratch memory of the exact size, so that a sanitizer sees an access past its end.
template <class F>
void with_scratch(int threads, F call) {
  std::vector<char> bytes(1);
  for (int64_t lacking = 1; lacking != 0;) {
    bytes.assign(lacking, 0x55);
    const int64_t more = call(cpu::Scratch{bytes.data(), lacking, threads});
    CHECK(more > lacking || more == 0);
    lacking = more;
  }
}

void run_decode(const cpu::Kernels& kernels, Problem& p, int threads) {
  with_scratch(threads, [&](const cpu::Scratch& scratch) {
    return cpu::decode(kernels, p.call, p.dense, p.scores.data(), scratch);
  });
}

// The kept tokens are the best by the kernel's own scores, ascending, ties to the lowest position.
void check_selection(const Problem& p, int row, int n_visual) {
  const cpu::Call& c = p.call;
  const int32_t* kept = p.indices.data() + int64_t{row} * c.score.k_max;
  const float* scores = p.scores.data() + int64_t{row} * c.cache.capacity;
  const Range seen = p.visible(row);
  const std::vector<bool>& visual = p.visual[p.cache_row(row)];
  const ScoreArgs& s = c.score;
  const float mass = s.mass_of == MassOf::kMean ? p.mass_mean[row] : p.mass[row];
  int wanted = s.wanted != nullptr
                   ? count_of_wanted(p.wanted[row], n_visual)
                   : count_of_ratio(
                         clamped_ratio(s.ratio != nullptr ? p.ratio[row] : mass, s.r_min, s.r_max),
                         n_visual);
  wanted = std::min(wanted, s.k_max);
  CHECK_THAT(p.counts[row] == wanted, "count %d, wanted %d", p.counts[row], wanted);
  std::vector<bool> is_kept(c.cache.capacity, false);
  for (int i = 0; i < s.k_max; ++i) {
    if (i >= p.counts[row]) {
      CHECK(kept[i] == -1);
      continue;
    }
    CHECK_THAT(kept[i] >= seen.begin && kept[i] < seen.end && visual[kept[i]], "kept %d", kept[i]);
    CHECK(i == 0 || kept[i] > kept[i - 1]);
    if (kept[i] >= 0 && kept[i] < c.cache.capacity) is_kept[kept[i]] = true;
  }
  uint64_t worst_kept = ~uint64_t{0}, best_dropped = 0;
  for (int n = seen.begin; n < seen.end; ++n) {
    if (!visual[n]) continue;
    // one number in the order of the contract: by score, then the lower position first
    const uint64_t order =
        uint64_t{sort_code(scores[n])} << 32 | (0xffffffffu - static_cast<uint32_t>(n));
    if (is_kept[n]) worst_kept = std::min(worst_kept, order);
    if (!is_kept[n]) best_dropped = std::max(best_dropped, order);
  }
  CHECK(p.counts[row] == 0 || p.counts[row] == n_visual || worst_kept > best_dropped);
}

void check_scores(const Problem& p, int row, const std::vector<std::vector<double>>& z,
                  int n_visual) {
  const cpu::Call& c = p.call;
  const Range seen = p.visible(row);
  const std::vector<bool>& visual = p.visual[p.cache_row(row)];
  const int keys = seen.end - seen.begin;
  std::vector<double> expected(keys, 0.0);
  double largest = 0.0, mean = 0.0;
  for (int h = 0; h < c.H; ++h) {
    const auto at_one = problem::softmax(z[h], 1.0), at_tau = problem::softmax(z[h], c.score.tau);
    double mass = 0.0;
    for (int i = 0; i < keys; ++i) {
      const double of = c.score.kind == ScoreKind::kLogit  ? z[h][i]
                        : c.score.kind == ScoreKind::kProb ? at_one[i]
                                                           : at_tau[i];
      expected[i] += of / c.H;
      if (visual[seen.begin + i]) mass += at_tau[i];
    }
    largest = std::max(largest, mass);
    mean += mass / c.H;
  }
  if (n_visual == 0) largest = mean = 0.0;
  CHECK_THAT(std::abs(p.mass[row] - largest) <= 2e-4 * largest + 1e-7, "mass %g, %g", p.mass[row],
             largest);
  CHECK_THAT(std::abs(p.mass_mean[row] - mean) <= 2e-4 * mean + 1e-7, "mean %g, %g",
             p.mass_mean[row], mean);
  for (int n = 0; n < c.cache.capacity; ++n) {
    const float got = p.scores[int64_t{row} * c.cache.capacity + n];
    if (n < seen.begin || n >= seen.end || !visual[n]) {
      CHECK_THAT(got == -HUGE_VALF, "score of no candidate %d: %g", n, got);
      continue;
    }
    const double want = expected[n - seen.begin];
    CHECK_THAT(std::abs(got - want) <= 5e-5 * std::abs(want) + 2e-5, "score %d: %g, %g", n, got,
               want);
  }
}

// The contract's rounding model, without its other term: twice the error of torch, that is not
// here.
void check_output(const cpu::Kernels& kernels, const Problem& p, int row,
                  const std::vector<std::vector<double>>& z, bool dense) {
  const cpu::Call& c = p.call;
  const Range seen = p.visible(row);
  const int b = p.cache_row(row);
  const int32_t* indices = p.indices.data() + int64_t{row} * c.score.k_max;
  double error = 0.0, largest = 0.0, largest_z = 0.0, largest_size = 0.0;
  bool nan = false;
  for (int h = 0; h < c.H; ++h) {
    std::vector<double> attended;
    std::vector<int> at;
    for (int n = seen.begin; n < seen.end; ++n) {
      const bool selected = std::binary_search(indices, indices + p.counts[row], n);
      if (!dense && p.visual[b][n] && !selected) continue;
      attended.push_back(z[h][n - seen.begin]);
      at.push_back(n);
      largest_z = std::max(largest_z, std::abs(attended.back()));
    }
    const auto weight = problem::softmax(attended, 1.0);
    const double scale = scale_of(c.cache.v_scale, h / (c.H / c.G));
    for (int d = 0; d < c.D; ++d) {
      double want = 0.0, size = 0.0;
      for (size_t i = 0; i < at.size(); ++i) {
        const double v = scale * p.v.get(p.slot(c.cache.v_stride, b, h / (c.H / c.G), at[i]) + d);
        want += weight[i] * v;
        size += weight[i] * std::abs(v);
      }
      const double got = p.out.get(p.head_at(row, h) + d);
      nan |= std::isnan(got);
      error = std::max(error, std::abs(got - want));
      largest = std::max(largest, std::abs(want));
      largest_size = std::max(largest_size, size);
    }
  }
  const double eps = std::numeric_limits<float>::epsilon();
  const bool rounds = kernels.rounds_bf16_weights && c.dtype == visionpulse::DType::kBFloat16;
  const double weights = rounds ? std::ldexp(1.0, -8) : 0.0;
  const double bound =
      largest_size * (eps * (4 + 2 * largest_z) + weights) + two_ulp(c.dtype, largest);
  CHECK_THAT(!nan && error <= bound, "output off by %g, bound %g, D=%d", error, bound, c.D);
}

void check_row(const cpu::Kernels& kernels, const Problem& p, int row) {
  const Range seen = p.visible(row);
  int n_visual = 0;
  for (int n = seen.begin; n < seen.end; ++n) n_visual += p.visual[p.cache_row(row)][n];
  const auto z = problem::logits_of(p, row);
  check_selection(p, row, n_visual);
  check_scores(p, row, z, n_visual);
  check_output(kernels, p, row, z, p.dense);
}

bool same_bits(const problem::Buffer& a, const problem::Buffer& b) {
  return a.u16 == b.u16 &&
         (a.f32.empty() || std::memcmp(a.f32.data(), b.f32.data(), 4 * a.f32.size()) == 0);
}

void run(const cpu::Kernels& kernels, Problem& p, problem::Random& r) {
  run_decode(kernels, p, 1);
  for (int row = 0; row < p.rows(); ++row) check_row(kernels, p, row);
  const problem::Buffer out = p.out;
  const auto indices = p.indices;
  const auto scores = p.scores;
  run_decode(kernels, p, 2 + static_cast<int>(r() % 3));
  CHECK(same_bits(out, p.out) && indices == p.indices);
  CHECK(std::memcmp(scores.data(), p.scores.data(), 4 * scores.size()) == 0);

  // the stages one by one give the same selection, and a follower the output of a pruned anchor
  with_scratch(1, [&](const cpu::Scratch& scratch) {
    return cpu::score(kernels, p.call, p.scores.data(), scratch);
  });
  with_scratch(2, [&](const cpu::Scratch& scratch) {
    return cpu::select(kernels, p.call, p.scores.data(), scratch);
  });
  CHECK(indices == p.indices);
  cpu::Call follower = p.call;
  follower.selection = {p.indices.data(), p.counts.data(), p.call.score.k_max};
  with_scratch(
      2, [&](const cpu::Scratch& scratch) { return cpu::attend(kernels, follower, scratch); });
  for (int row = 0; row < p.rows(); ++row)
    check_output(kernels, p, row, problem::logits_of(p, row), false);
}

#if defined(VP_HAVE_AMX_MODEL)
// As many problems as `wanted` that use the tiles of AMX. Returns the seed of one that failed, or
// 0.
uint32_t run_model_of_amx(uint32_t wanted, uint32_t first) {
  const cpu::Kernels* kernels = amx_model::kernels();
  if (kernels == nullptr) return 0;
  uint32_t solved = 0;
  for (uint32_t seed = first; solved < wanted; ++seed) {
    problem::Random random(seed);
    Problem p = problem::make(random);
    if (!amx_model::takes(p.call)) continue;
    if (solved % 2 == 1) problem::store_in_8_bits(p, random);
    run(*kernels, p, random);
    ++solved;
    if (check::failures != 0) return seed;
  }
  std::printf("%u problems through %s\n", solved, kernels->name);
  return 0;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const uint32_t problems = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 60;
  const uint32_t first = argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 1;
  const char* chosen;
  try {
    chosen = cpu::current().name;
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  for (uint32_t seed = first; seed < first + problems; ++seed) {
    problem::Random random(seed);
    Problem p = problem::make(random);
    if (seed % 4 == 0) problem::store_in_8_bits(p, random);
    for (const cpu::Kernels* kernels : cpu::available()) {
      run(*kernels, p, random);
      if (check::failures != 0) {
        std::printf("seed %u, instruction set %s\n", seed, kernels->name);
        return check::report("random");
      }
    }
  }
#if defined(VP_HAVE_AMX_MODEL)
  if (const uint32_t seed = run_model_of_amx(problems, first))
    std::printf("seed %u, the model of AMX\n", seed);
#endif
  std::printf("%u problems, instruction sets:", problems);
  for (const cpu::Kernels* kernels : cpu::available()) std::printf(" %s", kernels->name);
  std::printf(", chosen: %s\n", chosen);
  return check::report("random");
}
