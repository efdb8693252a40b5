// SPDX-License-Identifier: Apache-2.0
// The order and the pace in which vectors are asked for: each once, all within their block.
#include <vector>

#define VP_ISA prefetches
#include "kernels/cpu/prefetch.inl.h"
#include "tests/cpp/check.h"

using namespace visionpulse::cpu::prefetches;

namespace {

void turns_take_each_piece_once_and_pages_by_turns() {
  for (int count : {1, 16, 32, 48, 64, 128}) {
    for (int64_t bytes : {64, 128, 256, 320, 512, 1024, 4096, 8192}) {
      for (int log : {0, 1, 2}) {
        const PageTurns turns = PageTurns::make(count, bytes);
        const int64_t pages = int64_t{1} << turns.log_pages, pieces = int64_t{count} << log;
        std::vector<int> taken(pieces);
        for (int i = 0; i < pieces; ++i) {
          const int at = PageTurns::at(turns, i, log);
          CHECK(at >= 0 && at < pieces);
          if (at >= 0 && at < pieces) ++taken[at];
          if (pages > 1 && kPage % bytes == 0) CHECK((at >> log) * bytes / kPage == i % pages);
        }
        for (int n : taken)
          CHECK_THAT(n == 1, "%d times, %d of %lld bytes", n, count, (long long)bytes);
      }
    }
  }
  CHECK(PageTurns::make(64, 256).log_pages == 2);  // bfloat16 of 128 columns: four pages
  CHECK(PageTurns::make(48, 256).log_pages == 0);
}

void long_vectors_of_float32_have_pieces() {
  for (int lines = 1; lines <= 32; ++lines) {
    const int pieces = 1 << log_pieces<float>(lines);
    CHECK(pieces == 1 || lines / pieces == kPieceLines);
    CHECK(lines % pieces == 0);
    CHECK(log_pieces<uint16_t>(lines) == 0);
  }
  CHECK(log_pieces<float>(8) == 1);   // 128 columns
  CHECK(log_pieces<float>(16) == 2);  // the same of K and V in one row
  CHECK(log_pieces<float>(12) == 0);
}

struct Step {
  Phase phase;
  int steps;
};

// Those of a block of 64 keys in tiles, 4 heads of 128 columns.
constexpr Step kSteps[] = {{Phase::kProducts, 8}, {Phase::kLogits, 16}, {Phase::kMass, 16},
                           {Phase::kSoftmax, 16}, {Phase::kSums, 16},   {Phase::kOutput, 16}};

void a_pass_asks_for_all_at_an_even_pace(const Pass& pass, bool of_k, bool of_v, int lines) {
  int percent = 0;
  for (int share : pass.percent) percent += share;
  CHECK(percent == 100);
  constexpr int kKeys = 64;
  const std::vector<float> memory(lines * kLine / sizeof(float));
  std::vector<const float*> vectors(kKeys, memory.data());
  const float* const* at = vectors.data();
  Asked<float> asked =
      Asked<float>::make(of_k ? at : nullptr, of_v ? at : nullptr, kKeys, lines, &pass, {0, 0});
  const int all = (kKeys * (of_k + of_v)) << log_pieces<float>(lines);
  double due = 0;
  for (const Step& of : kSteps) {
    const int share = pass.percent[static_cast<int>(of.phase)];
    const int parts = Asked<float>::beside(asked, of.phase, of.steps);
    CHECK((parts > 0) == (share > 0));
    for (int i = 0; i < of.steps; ++i) {
      Asked<float>::some(asked, parts);
      due += all * share / 100.0 / of.steps;
      CHECK_THAT(asked.next > due - 1.001 && asked.next < due + 3, "%d asked, %.2f due", asked.next,
                 due);
    }
  }
  CHECK(asked.next == all);
  Asked<float>::some(asked, 1 << 20);
  CHECK(asked.next == all);
}

void without_a_pass_no_step_asks() {
  const float* vector = nullptr;
  Asked<float> asked = Asked<float>::make(&vector, &vector, 1, 1, nullptr, {0, 0});
  for (const Step& of : kSteps) {
    CHECK(Asked<float>::beside(asked, of.phase, of.steps) == 0);
    Asked<float>::some(asked, 0);
  }
  CHECK(asked.next == 0);
}

}  // namespace

int main() {
  turns_take_each_piece_once_and_pages_by_turns();
  long_vectors_of_float32_have_pieces();
  for (int lines : {1, 8, 12, 16}) {
    a_pass_asks_for_all_at_an_even_pace(kPassOverK, true, false, lines);
    a_pass_asks_for_all_at_an_even_pace(kPassOverV, false, true, lines);
    a_pass_asks_for_all_at_an_even_pace(kPassOverBoth, true, true, lines);
    a_pass_asks_for_all_at_an_even_pace(kPassWithMass, true, true, lines);
  }
  without_a_pass_no_step_asks();
  return check::report("prefetch");
}
