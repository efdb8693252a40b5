// SPDX-License-Identifier: Apache-2.0
// What host and device share: sort codes, budget, softmax in parts, splits, visible keys, spans.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/common/budget.h"
#include "kernels/common/sort_codes.h"
#include "kernels/common/visible_range.h"
#include "kernels/common/visual_spans.h"
#include "kernels/common/softmax.h"
#include "kernels/common/split.h"
#include "tests/cpp/check.h"

using namespace visionpulse;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

void sort_codes_order_as_scores_do() {
  CHECK(sort_code(0.0f) == sort_code(-0.0f));
  CHECK(sort_code(kNan) < sort_code(-kInf));
  CHECK(sort_code(kNan) == 0 && sort_code(-kNan) == 0);
  CHECK(sort_code(from_bits(0xffffffffu)) == 0 && sort_code(from_bits(0x7f800001u)) == 0);
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float a = from_bits(random()), b = from_bits(random());
    if (a != a || b != b) continue;
    CHECK_THAT((a < b) == (sort_code(a) < sort_code(b)), "a=%g b=%g", a, b);
    CHECK_THAT((a == b) == (sort_code(a) == sort_code(b)), "a=%g b=%g", a, b);
  }
}

void ratios_clamp_and_nan_fails_open() {
  CHECK(clamped_ratio(kNan, 0.05f, 0.1f) == 0.1f);
  CHECK(clamped_ratio(0.07f, 0.05f, 0.1f) == 0.07f);
  CHECK(clamped_ratio(0.0f, 0.05f, 0.1f) == 0.05f);
  CHECK(clamped_ratio(kInf, 0.05f, 0.1f) == 0.1f);
  CHECK(clamped_ratio(0.3f, 0.0f, 0.0f) == 0.0f);
}

void counts_floor_in_float32() {
  CHECK(count_of_ratio(0.5f, 0) == 0);
  CHECK(count_of_ratio(0.0f, 10) == 1);
  CHECK(count_of_ratio(1.0f, 10) == 10);
  CHECK(count_of_ratio(0.1f, 10) == 1);
  // in float64 float32(0.3) * 10 is 3.0000001, in float32 it is 3
  CHECK(count_of_ratio(0.3f, 10) == 3);
  // 0.29f * 100 rounds up to 29 in float32, where the exact product is 28.9999998
  CHECK(count_of_ratio(0.29f, 100) == static_cast<int>(0.29f * 100.0f));
  CHECK(count_of_ratio(1.0f, 16777217) <= 16777217);
  for (int n = 1; n < 3000; ++n)
    for (float r : {0.01f, 0.05f, 0.1f, 1.0f / 3.0f, 0.999f}) {
      volatile float product = r * static_cast<float>(n);
      const int floor = static_cast<int>(std::floor(product));
      const int expected = floor < 1 ? 1 : floor > n ? n : floor;
      CHECK_THAT(count_of_ratio(r, n) == expected, "r=%g n=%d", r, n);
    }
  CHECK(count_of_wanted(-3, 5) == 0 && count_of_wanted(9, 5) == 5 && count_of_wanted(4, 5) == 4);
}

void masses_take_max_mean_and_nan() {
  const float plain[4] = {0.25f, 0.5f, 0.125f, 0.125f};
  CHECK(masses_of_heads(plain, 4).max == 0.5f && masses_of_heads(plain, 4).mean == 0.25f);
  for (int at = 0; at < 4; ++at) {
    float spoiled[4] = {0.25f, 0.5f, 0.125f, 0.125f};
    spoiled[at] = kNan;
    const Masses masses = masses_of_heads(spoiled, 4);
    CHECK(masses.max != masses.max && masses.mean != masses.mean);
  }
}

// One part of a softmax, as the kernels keep and merge it.
struct SoftmaxPart {
  float m, l;
};

SoftmaxPart merged(SoftmaxPart a, SoftmaxPart b) {
  const float m = a.m > b.m ? a.m : b.m;
  return {m, a.l * std::exp2(rescale_exponent(a.m, m)) + b.l * std::exp2(rescale_exponent(b.m, m))};
}

SoftmaxPart part_of(const std::vector<float>& x, int begin, int end) {
  SoftmaxPart s = {minus_infinity(), 0.0f};
  for (int i = begin; i < end; ++i) s.m = x[i] > s.m ? x[i] : s.m;
  for (int i = begin; i < end; ++i) s.l += std::exp2(x[i] - safe_max(s.m));
  return s;
}

void merging_equals_one_pass() {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> logit(-300.0f, 300.0f);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> x(40);
    for (float& v : x) v = random() % 5 == 0 ? -kInf : logit(random);
    const int cut = static_cast<int>(random() % 41);
    const SoftmaxPart whole = part_of(x, 0, 40);
    const SoftmaxPart both = merged(part_of(x, 0, cut), part_of(x, cut, 40));
    CHECK(both.m == whole.m);
    CHECK_THAT(std::abs(both.l - whole.l) <= 1e-5f * whole.l, "%g %g", both.l, whole.l);
  }
  const SoftmaxPart nothing = {minus_infinity(), 0.0f}, one = {3.0f, 1.0f};
  CHECK(merged(nothing, one).l == 1.0f && merged(one, nothing).m == 3.0f);
  CHECK(merged(nothing, nothing).l == 0.0f);
  const SoftmaxPart nan = {minus_infinity(), kNan};
  CHECK(merged(nan, one).l != merged(nan, one).l);
  CHECK(merged(one, nan).l != merged(one, nan).l);
}

void splits_follow_the_row_alone() {
  const SplitRule rule = {128, 256, 4096, 64};
  for (int heads : {1, 2, 8, 32})
    for (int keys = 1; keys < 300000; keys = keys * 5 / 4 + 1) {
      const int length = split_length(rule, keys, heads), count = split_count(keys, length);
      CHECK(length % rule.tile == 0 && length >= rule.shortest && length <= rule.longest);
      CHECK(int64_t{count} * length >= keys && int64_t{count - 1} * length < keys);
    }
}

void ranges_stay_inside() {
  const auto same = [](Range r, int begin, int end) { return r.begin == begin && r.end == end; };
  CHECK(same(visible_range(0, 10, 10, 0), 0, 10));
  CHECK(same(visible_range(3, 20, 10, 0), 3, 10));
  CHECK(same(visible_range(-3, -1, 10, 0), 0, 0));
  CHECK(same(visible_range(0, 10, 10, 4), 6, 10));
  CHECK(same(visible_range(8, 10, 10, 4), 8, 10));
  CHECK(same(visible_range(12, 10, 10, 0), 10, 10));
  CHECK(same(visible_range(0, 3, 10, 4), 0, 3));
}

void compact_indices_count_what_lies_before() {
  std::mt19937 random(3);
  for (int round = 0; round < 100; ++round) {
    std::vector<int> mask(60);
    for (int& bit : mask) bit = random() % 3 == 0;
    std::vector<int32_t> spans, offsets = {0};
    int total = 0;
    for (int i = 0; i < 60; ++i) {
      if (!mask[i]) continue;
      const int begin = i;
      while (i < 60 && mask[i]) ++i;
      spans.insert(spans.end(), {begin, i});
      offsets.push_back(total += i - begin);
    }
    for (int empty = 0; empty < 3; ++empty) {
      spans.insert(spans.end(), {kNoSpan, kNoSpan});
      offsets.push_back(total);
    }
    const int count = static_cast<int>(spans.size()) / 2;
    for (int at = 0, before = 0; at <= 60; before += at < 60 ? mask[at] : 0, ++at)
      CHECK_THAT(visual_before(spans.data(), offsets.data(), count, at) == before, "at=%d", at);
  }
}

}  // namespace

int main() {
  sort_codes_order_as_scores_do();
  ratios_clamp_and_nan_fails_open();
  counts_floor_in_float32();
  masses_take_max_mean_and_nan();
  merging_equals_one_pass();
  splits_follow_the_row_alone();
  ranges_stay_inside();
  compact_indices_count_what_lies_before();
  return check::report("common");
}
