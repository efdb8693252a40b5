// SPDX-License-Identifier: Apache-2.0
// The tile instructions of AMX in software, under the names of their intrinsics, as Intel's manual
// defines them. What would fault on the CPU ends the program with a message.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace amx_model {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tiles {
  Config config;
  uint8_t data[8][16][64];
};

inline thread_local Tiles tiles = {};
inline thread_local long products = 0, configurations = 0;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX model: %s\n", what);
  std::abort();
}

inline int rows_of(int t) {
  require(tiles.config.palette == 1, "a tile is used without a configuration");
  require(t >= 0 && t < 8 && tiles.config.rows[t] != 0, "a tile is used that was not configured");
  return tiles.config.rows[t];
}
inline int bytes_of(int t) {
  rows_of(t);
  return tiles.config.row_bytes[t];
}

inline void load_config(const void* from) {
  Config config;
  std::memcpy(&config, from, sizeof config);
  require(config.palette <= 1 && config.start_row == 0, "palette or start row");
  for (uint8_t byte : config.reserved) require(byte == 0, "a reserved byte is not 0");
  for (int t = 0; t < 16; ++t) {
    const bool used = config.rows[t] != 0;
    require(used == (config.row_bytes[t] != 0), "rows without bytes, or bytes without rows");
    require(config.rows[t] <= 16 && config.row_bytes[t] <= 64 && (t < 8 || !used), "tile size");
  }
  tiles = {};
  if (config.palette == 1) tiles.config = config;
  ++configurations;
}

inline void load(int t, const void* from, int64_t stride) {
  uint8_t rows[16][64] = {};
  for (int i = 0; i < rows_of(t); ++i)
    std::memcpy(rows[i], static_cast<const char*>(from) + i * stride, bytes_of(t));
  std::memcpy(tiles.data[t], rows, sizeof rows);
}

inline void store(int t, void* to, int64_t stride) {
  for (int i = 0; i < rows_of(t); ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tiles.data[t][i], bytes_of(t));
}

inline void zero(int t) {
  rows_of(t);
  std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}

// A subnormal number counts as zero, as operand and as result.
inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
inline float widened(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return flushed(x);
}

// The even and the odd elements of the pairs are summed apart, each product fused with its sum;
// then both are added, and their sum to the tile. Rounds to nearest even.
inline void dot(int c, int a, int b) {
  const int rows = rows_of(c), columns = bytes_of(c) / 4, depth = bytes_of(a) / 4;
  require(c != a && c != b && a != b, "a product names a tile twice");
  require(rows_of(a) == rows && bytes_of(b) == bytes_of(c) && rows_of(b) == depth, "tile shapes");
  require(bytes_of(a) % 4 == 0 && bytes_of(b) % 4 == 0, "a row that ends within a pair");
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      float sum[2] = {0.0f, 0.0f};
      for (int k = 0; k < depth; ++k) {
        uint16_t left[2], right[2];
        std::memcpy(left, tiles.data[a][m] + 4 * k, 4);
        std::memcpy(right, tiles.data[b][k] + 4 * n, 4);
        for (int i = 0; i < 2; ++i)
          sum[i] = flushed(std::fma(widened(left[i]), widened(right[i]), sum[i]));
      }
      float all;
      std::memcpy(&all, tiles.data[c][m] + 4 * n, 4);
      all = flushed(flushed(all) + flushed(sum[0] + sum[1]));
      std::memcpy(tiles.data[c][m] + 4 * n, &all, 4);
    }
  }
  for (int m = rows; m < 16; ++m) std::memset(tiles.data[c][m], 0, 64);
  ++products;
}

}  // namespace amx_model

// In the namespace of the kernels, where these names come before those of the compiler.
#if defined(VP_ISA)
namespace visionpulse::cpu::VP_ISA {

inline void _tile_loadconfig(const void* from) { amx_model::load_config(from); }
inline void _tile_storeconfig(void* to) { std::memcpy(to, &amx_model::tiles.config, 64); }
inline void _tile_release() { amx_model::tiles = {}; }
inline void _tile_loadd(int t, const void* from, int64_t stride) {
  amx_model::load(t, from, stride);
}
inline void _tile_stored(int t, void* to, int64_t stride) { amx_model::store(t, to, stride); }
inline void _tile_zero(int t) { amx_model::zero(t); }
inline void _tile_dpbf16ps(int c, int a, int b) { amx_model::dot(c, a, b); }

}  // namespace visionpulse::cpu::VP_ISA
#endif
