// SPDX-License-Identifier: Apache-2.0
// Prefetches of K and V while another block is computed.
#pragma once

#include "kernels/cpu/types.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kLine = 64;    // bytes of a cache line
constexpr int kPage = 4096;  // bytes of a page of memory

// Into L2: a prefetch into L1 would hold one of its few miss buffers until memory answers.
template <int LINES>
VP_INLINE void prefetch_lines(const void* from) {
  const char* p = static_cast<const char*>(from);
#pragma GCC unroll 8
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(p + i * kLine, 0, 2);
}

// One vector, whole: parts of it would mislead the hardware's prefetcher. The common sizes are
// unrolled.
VP_INLINE void prefetch_vector(const void* vector, int lines) {
  if (lines == 2) return prefetch_lines<2>(vector);
  if (lines == 4) return prefetch_lines<4>(vector);
  if (lines == 8) return prefetch_lines<8>(vector);
  const char* p = static_cast<const char*>(vector);
#pragma GCC unroll 1
  for (int i = 0; i < lines; ++i) prefetch_lines<1>(p + i * kLine);
}

template <class T>
VP_INLINE int lines_of(int dim) {
  return (dim * static_cast<int>(sizeof(T)) + kLine - 1) / kLine;
}

template <class T>
VP_INLINE void prefetch_all(const T* const* vectors, int count, int dim, int64_t offset = 0) {
  for (int i = 0; i < count; ++i) prefetch_vector(vectors[i] + offset, lines_of<T>(dim));
}

// Asks for a line of each page that vectors of a stream lie on, all at once. A prefetch from a page
// that the CPU has no translation of holds up what comes behind it for a walk of the page tables,
// and several walks run side by side; and from there on the hardware's prefetcher runs ahead too.
template <class T>
VP_INLINE void touch_pages(const T* const* vectors, int count, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
  const int step = bytes <= 0 || bytes > kPage ? 1 : kPage / static_cast<int>(bytes);
  for (int i = 0; i < count; i += step) prefetch_lines<1>(vectors[i]);
}

// The lines of a vector that begin in its columns [column, column + COLUMNS), lines counted from
// the vector's begin.
template <int COLUMNS, class T>
VP_INLINE void prefetch_columns(const T* vector, int column) {
  constexpr int kBytes = COLUMNS * static_cast<int>(sizeof(T));
  if (kBytes % kLine == 0) {
    prefetch_lines<kBytes / kLine>(vector + column);
  } else if (column * static_cast<int>(sizeof(T)) % kLine == 0) {
    prefetch_lines<1>(vector + column);
  }
}

// How a CPU is asked for more than its own prefetcher brings.
// - By pages: one vector of each page of memory in turn, in a file of isa/ that says so, at an even
//   pace through all that is computed of a block. The prefetcher of Intel's cores runs ahead in
//   each page by itself, so several pages bring more than one after the other.
// - Else each vector twice, since the CPU drops a prefetch where too many wait: a block ahead, and
//   where the phase before reads. That is V beside K, and K of the block to come beside V; in a
//   pass over one of them a vector a little ahead.
#if defined(VP_ASKS_BY_PAGES)
constexpr bool kAsksByPages = true;
#else
constexpr bool kAsksByPages = false;
#endif
// A long vector of float32 is asked for in pieces: while more lines of one page are asked for at
// once, the other pages wait. In 16 bits more pieces cost more instructions than they bring.
constexpr int kPieceLines = 4;
template <class T>
constexpr bool kInPieces = sizeof(T) == 4;

template <class T>
VP_INLINE int log_pieces(int lines) {
  const int pieces = lines / kPieceLines;
  const bool in_pieces =
      kInPieces<T> && pieces > 1 && lines % kPieceLines == 0 && (pieces & (pieces - 1)) == 0;
  return in_pieces ? __builtin_ctz(static_cast<unsigned>(pieces)) : 0;
}

// Vectors of a block in turn: a piece of one of each of the pages that they fill one after the
// other.
struct PageTurns {
  int log_pages, log_each;  // each: vectors of a page

  // Of `count` keys; in their own order where they fill no pages.
  VP_INLINE PageTurns make(int count, int64_t key_bytes) {
    const int64_t pages = count * key_bytes / kPage;
    if (pages < 2 || pages > count || (pages & (pages - 1)) != 0 || (count & (count - 1)) != 0)
      return {0, 0};
    const int log_pages = __builtin_ctz(static_cast<unsigned>(pages));
    return {log_pages, __builtin_ctz(static_cast<unsigned>(count)) - log_pages};
  }
  // The piece that is asked for as number i, counted from the first vector's first.
  VP_INLINE int at(const PageTurns& t, int i, int log_of_vector) {
    const int page = i & ((1 << t.log_pages) - 1);
    return (page << (t.log_each + log_of_vector)) | (i >> t.log_pages);
  }
};

// What is computed of a block, one after the other, and the passes that have some of it.
enum class Phase { kProducts, kLogits, kMass, kSoftmax, kSums, kOutput };
constexpr int kPhases = 6;
struct Pass {
  int percent[kPhases];  // of the vectors to ask for in each phase
};
// Memory should have as much to do in all phases: measured (docs/internals/cpu-bounds.md).
constexpr Pass kPassOverK = {{40, 10, 30, 20, 0, 0}};
constexpr Pass kPassOverV = {{0, 0, 0, 20, 55, 25}};
constexpr Pass kPassOverBoth = {{20, 12, 0, 12, 38, 18}};
constexpr Pass kPassWithMass = {{12, 6, 12, 8, 36, 26}};

// What is asked for while a block is computed, a few lines at a time, since a burst would fill the
// miss buffers: at the place of each of its keys, or at each step of its phases.
template <class T>
struct Asked {
  const T* const* k;  // of the block to come; nullptr: no logits are made
  const T* const* v;  // nullptr: no values are summed, or they are asked for with K
  int count, lines;   // vectors of each, and lines of a vector
  const Pass* pass;   // how many go with the steps; nullptr: each has its place
  PageTurns turns;    // that the steps take them in
  int log_of_vector;  // pieces of a vector: 2^log_of_vector
  int of_k, all;      // pieces of K, and with those of V
  int each;           // parts of a piece at each step of the phase at hand
  int next;           // piece
  int due;            // parts of a piece that are not asked for yet

  VP_INLINE Asked make(const T* const* k, const T* const* v, int count, int lines, const Pass* pass,
                       PageTurns turns) {
    const int log_of_vector = log_pieces<T>(lines), of_one = count << log_of_vector;
    const int of_k = k != nullptr ? of_one : 0, all = of_k + (v != nullptr ? of_one : 0);
    return {k, v, count, lines, pass, turns, log_of_vector, of_k, all, 0, 0, 0};
  }

  // `parts` of a piece more.
  VP_INLINE void some(Asked& a, int parts) {
    const int log = kInPieces<T> ? a.log_of_vector : 0, lines = a.lines >> log;
    for (a.due += parts; a.due >= kParts && a.next < a.all; a.due -= kParts, ++a.next) {
      const bool is_key = a.next < a.of_k;
      const int i = PageTurns::at(a.turns, is_key ? a.next : a.next - a.of_k, log);
      const char* from = reinterpret_cast<const char*>(is_key ? a.k[i >> log] : a.v[i >> log]);
      prefetch_vector(from + (i & ((1 << log) - 1)) * lines * kLine, lines);
    }
  }
  // The parts for each of `steps` steps of a phase.
  VP_INLINE int beside(const Asked& a, Phase phase, int steps) {
    if (a.pass == nullptr) return 0;
    const int percent = a.pass->percent[static_cast<int>(phase)];
    return (kParts * a.all * percent + 100 * steps - 1) / (100 * steps);
  }

  static constexpr int kParts = 64;  // of a piece
};

// Whether the products of a type have no place for each key.
template <class T>
constexpr bool kHasNoPlaces = false;

// What goes with each tile of a softmax, given its phase.
template <class T>
VP_INLINE auto ask_beside_softmax(Asked<T>& asked, int tiles) {
  const int mass = Asked<T>::beside(asked, Phase::kMass, tiles);
  const int weights = Asked<T>::beside(asked, Phase::kSoftmax, tiles);
  return [&asked, mass, weights](Phase phase) {
    if (kAsksByPages) Asked<T>::some(asked, phase == Phase::kMass ? mass : weights);
  };
}

template <class T>
constexpr int kSoon = 32 / static_cast<int>(sizeof(T));  // a little: 4 KiB of 128 columns

// KV heads that are computed together, and the way from one to the next.
struct KvHeads {
  int count;
  int64_t k_stride, v_stride;
};

// Prefetches the vectors of the next block while several queries share the one before. Spread out,
// because a burst would fill the miss buffers and stall.
template <class T>
struct Prefetch {
  const T* const* at;    // of the list being fetched: K, then V
  const T* const* then;  // V, if it is still to come
  int left, left_then;   // keys of both lists
  int lines;             // of a vector
  int passes;            // calls of `fetch` for each key of the block being computed
  int lists;             // 2 of K and V, 1 of K alone or of K and V in one row
  int due;

  // Without V: v is nullptr.
  VP_INLINE Prefetch make(const T* const* k, const T* const* v, int keys, int dim, int passes) {
    const bool one_row = v != nullptr && keys > 0 && v[0] == k[0] + dim;
    const int lists = v != nullptr && !one_row ? 2 : 1;
    const int lines = lines_of<T>(one_row ? 2 * dim : dim);
    return {k, v, keys, lists == 2 ? keys : 0, lines, passes, lists, 0};
  }

  VP_INLINE void fetch(Prefetch& p, int keys) {
    for (p.due += p.lists * keys; p.due >= p.passes; p.due -= p.passes) {
      if (p.left == 0) {
        if (p.left_then == 0) return;
        p.at = p.then;
        p.left = p.left_then;
        p.left_then = 0;
      }
      prefetch_vector(*p.at, p.lines);
      ++p.at;
      --p.left;
    }
  }
};

}  // namespace visionpulse::cpu::VP_ISA
