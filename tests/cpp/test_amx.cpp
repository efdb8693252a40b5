// SPDX-License-Identifier: Apache-2.0
// Who may use AMX, and the model of its instructions that the kernels are tested over.
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/cpu/amx.h"
#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/engine.h"
#include "tests/cpp/amx_modelled.h"
#include "tests/cpp/check.h"
#include "tests/cpp/problem.h"
#if defined(VP_HAVE_AMX_MODEL)
#include "tests/cpp/amx_model.h"
#endif

using namespace visionpulse;

namespace {

bool says(const cpu::AmxSupport& support, const char* words) {
  const char* reason = cpu::amx_refusal(support);
  return reason != nullptr && std::strstr(reason, words) != nullptr;
}

void a_refusal_names_what_is_missing() {
  const uint64_t saved = uint64_t{3} << 17;
  CHECK(cpu::amx_refusal({true, true, saved, 0}) == nullptr);
  CHECK(says({false, true, saved, 0}, "no AMX"));
  CHECK(says({true, false, saved, 0}, "bfloat16"));
  CHECK(says({true, true, uint64_t{1} << 17, 0}, "operating system"));
  CHECK(says({true, true, uint64_t{1} << 18, 0}, "operating system"));
  CHECK(says({true, true, saved, ENOSPC}, "sigaltstack"));
  CHECK(says({true, true, saved, EINVAL}, "5.16"));
  CHECK(says({true, true, saved, EPERM}, "ARCH_REQ_XCOMP_PERM"));
}

// A CPU that has it and may use it takes it unasked.
void it_comes_first_or_is_refused_with_the_reason() {
  bool first = true;
  for (const cpu::Kernels* kernels : cpu::available()) {
    if (std::strcmp(kernels->name, "avx512_amx") == 0)
      CHECK(first && cpu::amx_refusal() == nullptr);
    first = false;
  }
#if defined(VP_HAVE_AVX512_AMX)
  if (cpu::amx_refusal() == nullptr)
    CHECK(std::strcmp(cpu::available().front()->name, "avx512_amx") == 0);
#endif
  std::string error;
  try {
    cpu::use("avx512_amx");
  } catch (const std::exception& e) {
    error = e.what();
  }
  if (cpu::amx_refusal() != nullptr) CHECK(error.find(cpu::amx_refusal()) != std::string::npos);
}

#if defined(VP_HAVE_AMX_MODEL)
uint16_t short_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// One product of a tile [1, 2 * depth] with a tile [depth pairs, 1], onto `sum`.
float product(const std::vector<float>& a, const std::vector<float>& b, float sum) {
  const int depth = static_cast<int>(a.size()) / 2;
  amx_model::Config config = {};
  config.palette = 1;
  config.rows[0] = config.rows[1] = 1;
  config.rows[2] = static_cast<uint8_t>(depth);
  config.row_bytes[0] = config.row_bytes[2] = 4;
  config.row_bytes[1] = static_cast<uint16_t>(4 * depth);
  amx_model::load_config(&config);
  uint16_t left[32], right[32];
  for (int i = 0; i < 2 * depth; ++i) {
    left[i] = short_of(a[i]);
    right[i] = short_of(b[i]);
  }
  amx_model::load(0, &sum, 4);
  amx_model::load(1, left, 4 * depth);
  amx_model::load(2, right, 4);
  amx_model::dot(0, 1, 2);
  amx_model::store(0, &sum, 4);
  return sum;
}

void the_model_multiplies_as_the_manual_says() {
  CHECK(product({1, 2, 3, 4}, {5, 6, 7, 8}, 9) == 5 + 12 + 21 + 32 + 9);
  // even and odd elements are summed apart: 2^24 + 1 - 2^24 keeps its 1 only across the two sums
  const float large = 16777216.0f;
  CHECK(product({large, 1, -large, 0}, {1, 1, 1, 0}, 0) == 1.0f);
  CHECK(product({large, 0, 1, 0, -large, 0}, {1, 0, 1, 0, 1, 0}, 0) == 0.0f);
  // fused: the product of two numbers of 8 bits meets the sum before it is rounded
  const float near = 1.0078125f;  // 1 + 2^-7
  CHECK(product({-large, 0, near, 0}, {near, 0, large, 0}, 0) == 0.0f);
  // subnormal operands and results count as zero, and keep no trace in the sum
  const float tiny = std::ldexp(1.0f, -127), least = std::ldexp(1.0f, -126);
  CHECK(product({tiny, 0}, {large, 0}, 0) == 0.0f);
  CHECK(product({least, 0}, {0.5f, 0}, 0) == 0.0f);
  CHECK(product({0, 0}, {0, 0}, tiny) == 0.0f);
  CHECK(std::isnan(product({HUGE_VALF, 0}, {0, 0}, 0)));
}

constexpr int kKeys = 300, kHeads = 8, kKvHeads = 2, kDim = 64;

// One dense row whose keys and values are those of `keys`, laid out by strides and pages.
struct Layout {
  problem::Problem p;

  Layout(const std::vector<float>& numbers, Strides strides, int page) {
    cpu::Call& c = p.call;
    c.dtype = c.cache.dtype = DType::kBFloat16;
    c.B = c.queries.count = 1;
    c.H = kHeads, c.G = kKvHeads, c.D = kDim;
    c.cache.capacity = kKeys;
    c.cache.k_stride = c.cache.v_stride = strides;
    c.score.scale = 0.2f;
    c.score.tau = 1.0f;
    if (page > 0) {
      c.cache.page_size = page;
      c.cache.table_stride = c.cache.pages = kKeys / page;
      for (int i = 0; i < c.cache.pages; ++i) p.table.push_back((i * 7 + 3) % c.cache.pages);
      c.cache.table = p.table.data();
    }
    const int64_t size = int64_t{kKeys} * kKvHeads * kDim;
    for (problem::Buffer* buffer : {&p.k, &p.v, &p.q, &p.out}) {
      const bool cache = buffer == &p.k || buffer == &p.v;
      buffer->make(c.dtype, cache ? size : kHeads * kDim);
    }
    for (int i = 0; i < kHeads * kDim; ++i) p.q.set(i, numbers[2 * size + i]);
    for (int64_t i = 0; i < size; ++i) {
      const int n = static_cast<int>(i / kDim % kKeys), g = static_cast<int>(i / kDim / kKeys);
      p.k.set(p.slot(strides, 0, g, n) + i % kDim, numbers[i]);
      p.v.set(p.slot(strides, 0, g, n) + i % kDim, numbers[size + i]);
    }
    c.cache.k = p.k.data();
    c.cache.v = p.v.data();
    c.q = p.q.data();
    c.out = p.out.data();
    c.q_stride.row = c.out_stride.row = kHeads * kDim;
    c.q_stride.head = c.out_stride.head = kDim;
  }

  const std::vector<uint16_t>& attend() {
    std::vector<char> bytes(1);
    while (const int64_t more = cpu::attend(*amx_model::kernels(), p.call,
                                            {bytes.data(), static_cast<int64_t>(bytes.size()), 1}))
      bytes.assign(more, 0);
    return p.out.u16;
  }
};

void a_row_has_the_same_bits_wherever_its_keys_lie() {
  problem::Random random(5);
  std::vector<float> numbers(2 * kKeys * kKvHeads * kDim + kHeads * kDim);
  for (float& x : numbers) x = problem::normal(random);
  const int64_t head = kKeys * kDim, token = kKvHeads * kDim;
  Layout by_head(numbers, {0, head, kDim}, 0), by_token(numbers, {0, kDim, token}, 0);
  const long before = amx_model::products;
  const auto expected = by_head.attend();
  CHECK(amx_model::products > before);
  CHECK(by_token.attend() == expected);
  for (int page : {1, 5, 20, 60, 100}) {
    Layout pages(numbers, {page * token, kDim, token}, page);
    CHECK_THAT(pages.attend() == expected, "pages of %d", page);
    Layout heads(numbers, {page * token, page * kDim, kDim}, page);
    CHECK_THAT(heads.attend() == expected, "pages of %d, by heads", page);
  }
}

void eight_bits_are_multiplied_in_tiles() {
  problem::Random random(7);
  std::vector<float> numbers(2 * kKeys * kKvHeads * kDim + kHeads * kDim, 0.5f);
  Layout layout(numbers, {0, kKeys * kDim, kDim}, 0);
  layout.attend();
  const long before = amx_model::products;
  layout.attend();
  const long of_16_bits = amx_model::products - before;
  problem::store_in_8_bits(layout.p, random);
  layout.attend();
  CHECK(amx_model::products - before == 2 * of_16_bits);
}

void a_call_leaves_the_configuration_that_it_found() {
  std::vector<float> numbers(2 * kKeys * kKvHeads * kDim + kHeads * kDim, 0.5f);
  Layout layout(numbers, {0, kKeys * kDim, kDim}, 0);
  amx_model::Config others = {};
  amx_model::load_config(&others);
  layout.attend();
  CHECK(amx_model::tiles.config.palette == 0);
  others.palette = 1;
  others.rows[6] = 3;
  others.row_bytes[6] = 12;
  amx_model::load_config(&others);
  layout.attend();
  CHECK(std::memcmp(&amx_model::tiles.config, &others, sizeof others) == 0);
}
#endif

}  // namespace

int main() {
#if defined(VP_HAVE_AMX_MODEL)
  the_model_multiplies_as_the_manual_says();
  if (amx_model::kernels() != nullptr) {
    a_row_has_the_same_bits_wherever_its_keys_lie();
    eight_bits_are_multiplied_in_tiles();
    a_call_leaves_the_configuration_that_it_found();
  }
#endif
  a_refusal_names_what_is_missing();
  it_comes_first_or_is_refused_with_the_reason();
  return check::report("amx");
}
