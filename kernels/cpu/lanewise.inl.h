// SPDX-License-Identifier: Apache-2.0
// The arithmetic of several queries: how q, K and V of a storage type are multiplied lane by lane.
#pragma once

#include "kernels/cpu/values.inl.h"

namespace visionpulse::cpu::VP_ISA {

// Products lane by lane: of single elements in float32, unless the CPU multiplies pairs of the type
// itself.
template <class T>
struct Lanewise {
  static constexpr int kStep = 1;              // elements along D, or keys of V, of one product
  static constexpr bool kWholeBlocks = false;  // V of a block is padded with zeros to kBlock keys
  using Element = float;
  using Factor = Vec;
  VP_INLINE Vec load(const Element* p) { return vload(p); }
  VP_INLINE Vec repeat(const Element* p) { return vset(*p); }
  VP_INLINE Vec repeat_weight(const float* p) { return vset(*p); }
  VP_INLINE Vec add(Vec sum, Vec a, Vec b) { return vfma(a, b, sum); }
};

#if defined(VP_HAS_PAIR_DOT)
template <>
struct Lanewise<bf16> {
  static constexpr int kStep = 2;
  static constexpr bool kWholeBlocks = false;
  using Element = bf16;
  using Factor = Pairs;
  VP_INLINE Pairs load(const bf16* p) { return load_pairs(p); }
  VP_INLINE Pairs repeat(const bf16* p) { return repeat_pair(p); }
  VP_INLINE Pairs repeat_weight(const float* p) { return repeat_pair(p); }
  VP_INLINE Vec add(Vec sum, Pairs a, Pairs b) { return dot_pairs(sum, a, b); }
};
template <>
struct Lanewise<f8_as_bf16> : Lanewise<bf16> {};
#endif

template <class T>
using Element = typename Lanewise<T>::Element;

// Columns of q and of a vector of K: whole units.
template <class T>
VP_INLINE int key_columns(int dim) {
  return padded_dim(dim, Dot<T>::kColumns);
}

}  // namespace visionpulse::cpu::VP_ISA
