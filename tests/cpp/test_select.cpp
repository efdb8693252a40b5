// SPDX-License-Identifier: Apache-2.0
// The selection of long rows, whose codes are narrowed by a sample first: exact also where the
// sample misleads.
#include <algorithm>
#include <functional>
#include <numeric>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/engine.h"
#include "kernels/common/sort_codes.h"
#include "tests/cpp/check.h"
#include "tests/cpp/problem.h"

using namespace visionpulse;

namespace {

std::vector<int32_t> selected(const cpu::Kernels& kernels, const std::vector<float>& scores,
                              int kept) {
  const int32_t size = static_cast<int32_t>(scores.size());
  const int32_t spans[2] = {0, size}, offsets[2] = {0, size};
  std::vector<int32_t> indices(kept), counts(1);
  cpu::Call c = {};
  c.B = c.G = c.H = 1;
  c.D = 8;
  c.cache.capacity = size;
  c.visual = {spans, offsets, 1};
  c.score.k_max = kept;
  c.score.wanted = &kept;
  c.indices = indices.data();
  c.counts = counts.data();
  std::vector<char> scratch(1);
  while (const int64_t lacking = cpu::select(
             kernels, c, scores.data(), {scratch.data(), static_cast<int64_t>(scratch.size()), 1}))
    scratch.resize(lacking);
  CHECK(counts[0] == kept);
  return indices;
}

std::vector<int32_t> expected(const std::vector<float>& scores, int kept) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return sort_code(scores[a]) > sort_code(scores[b]);
  });
  order.resize(kept);
  std::sort(order.begin(), order.end());
  return order;
}

void check_all(const char* what, const std::vector<float>& scores) {
  const int size = static_cast<int>(scores.size());
  for (const cpu::Kernels* kernels : cpu::available())
    for (int kept : {1, size / 20, size / 2, size - 1, size})
      CHECK_THAT(selected(*kernels, scores, kept) == expected(scores, kept), "%s, %d of %d, %s",
                 what, kept, size, kernels->name);
}

std::vector<float> filled(int size, const std::function<float(int)>& score) {
  std::vector<float> scores(size);
  for (int i = 0; i < size; ++i) scores[i] = score(i);
  return scores;
}

}  // namespace

int main() {
  problem::Random r(1);
  for (int size : {4096, 4097, 9000, 33000}) {
    check_all("random", filled(size, [&](int) { return problem::normal(r); }));
    check_all("few values", filled(size, [&](int) { return static_cast<float>(r() % 3); }));
    check_all("one value", filled(size, [&](int) { return 0.25f; }));
    check_all("NaN and infinity", filled(size, [&](int i) {
                return i % 7 == 0 ? std::nanf("") : i % 5 == 0 ? -HUGE_VALF : problem::normal(r);
              }));
    // the sample's places, which the kernels alone know: all larger, then all smaller than others
    std::vector<bool> sampled(size, false);
    for (uint32_t i = 0; i < 512; ++i)
      sampled[((uint64_t{i} << 16) + (i * 0x9e3779b1u >> 16)) * size >> 25] = true;
    for (float sign : {1.0f, -1.0f})
      check_all("a sample that misleads", filled(size, [&](int i) {
                  return problem::normal(r) + (sampled[i] ? 100.0f * sign : 0.0f);
                }));
  }
  return check::report("select");
}
