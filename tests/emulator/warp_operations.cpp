// Shuffle, ldmatrix and mma for a whole warp. Layouts: PTX ISA, "Matrix fragments for mma".
#include "cta.h"
#include "number.h"
#include <cstring>
#include <fmt/format.h>

namespace kda::emulator {
namespace {

template <class T>
const T& argument(void* const* arguments, int lane) {
  return *static_cast<const T*>(arguments[lane]);
}

void shuffle(void* const* arguments) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& own = *static_cast<ShuffleArguments*>(arguments[lane]);
    own.result = argument<ShuffleArguments>(arguments, own.source & 31).value;
  }
}

std::string store_matrix(void* const* arguments, bool transposed, const unsigned char* shared,
                         std::size_t shared_bytes) {
  for (int lane = 0; lane < 32; ++lane) {
    void* row = argument<StoreMatrixArguments>(arguments, lane).row;
    const auto offset = static_cast<const unsigned char*>(row) - shared;
    if (offset < 0 || static_cast<std::size_t>(offset) + 16 > shared_bytes || offset % 16 != 0)
      return fmt::format("lane {} gives byte {} of {} in shared memory; a row is 16 bytes and so aligned",
                         lane, offset, shared_bytes);
    std::uint16_t values[8];
    for (int column = 0; column < 8; ++column) {
      const int r = transposed ? column : lane % 8, c = transposed ? lane % 8 : column;
      const unsigned word = argument<StoreMatrixArguments>(arguments, r * 4 + c / 2).value[lane / 8];
      values[column] = static_cast<std::uint16_t>(word >> (c % 2 * 16));
    }
    std::memcpy(row, values, sizeof values);
  }
  return {};
}

void move_matrix(void* const* arguments) {
  const auto element = [&](int r, int c) {
    return argument<WordArguments>(arguments, r * 4 + c / 2).value >> (c % 2 * 16) & 0xffffU;
  };
  for (int lane = 0; lane < 32; ++lane)
    static_cast<WordArguments*>(arguments[lane])->result =
        element(lane % 4 * 2, lane / 4) | element(lane % 4 * 2 + 1, lane / 4) << 16;
}

void ballot(void* const* arguments) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane)
    all |= argument<WordArguments>(arguments, lane).value << lane;
  for (int lane = 0; lane < 32; ++lane)
    static_cast<WordArguments*>(arguments[lane])->result = all;
}

std::string load_matrix(void* const* arguments, bool transposed, const unsigned char* shared,
                        std::size_t shared_bytes) {
  std::uint16_t m[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const void* row = argument<LoadMatrixArguments>(arguments, lane).row;
    const auto offset = static_cast<const unsigned char*>(row) - shared;
    if (offset < 0 || static_cast<std::size_t>(offset) + 16 > shared_bytes || offset % 16 != 0)
      return fmt::format("lane {} gives byte {} of {} in shared memory; a row is 16 bytes and so aligned",
                         lane, offset, shared_bytes);
    std::memcpy(m[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    unsigned* result = argument<LoadMatrixArguments>(arguments, lane).result;
    for (int i = 0; i < 4; ++i) {
      const unsigned low = transposed ? m[i][2 * t][g] : m[i][g][2 * t];
      const unsigned high = transposed ? m[i][2 * t + 1][g] : m[i][g][2 * t + 1];
      result[i] = low | high << 16;
    }
  }
  return {};
}

/// Products are exact in fp32; the sum is sequential and rounds to nearest, where hardware truncates.
template <int depth>
void multiply(float (&d)[16][8], const float (&a)[16][depth], const float (&b)[depth][8]) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < depth; ++k)
      for (int j = 0; j < 8; ++j)
        d[i][j] += a[i][k] * b[k][j];
}

/// What the fragments of a warp hold, as matrices.
template <int depth>
struct Tile {
  float a[16][depth], b[depth][8], d[16][8];

  void load_d(void* const* arguments) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = argument<MmaArguments>(arguments, lane).d[i];
  }
  void multiply_and_store(void* const* arguments) {
    multiply<depth>(d, a, b);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        argument<MmaArguments>(arguments, lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
};

template <float (*value)(unsigned)>
void mma_16bit(void* const* arguments) {
  Tile<16> tile;
  tile.load_d(arguments);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = argument<MmaArguments>(arguments, lane);
    const int g = lane / 4, t = lane % 4;
    unsigned a[4];
    std::memcpy(a, own.a, sizeof a);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        tile.a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = value(a[i] >> (16 * half) & 0xffffU);
      tile.b[2 * t + half][g] = value(own.b0 >> (16 * half) & 0xffffU);
      tile.b[2 * t + half + 8][g] = value(own.b1 >> (16 * half) & 0xffffU);
    }
  }
  tile.multiply_and_store(arguments);
}

void mma_tf32(void* const* arguments) {
  Tile<8> tile;
  tile.load_d(arguments);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = argument<MmaArguments>(arguments, lane);
    const int g = lane / 4, t = lane % 4;
    unsigned a[4];
    std::memcpy(a, own.a, sizeof a);
    for (int i = 0; i < 4; ++i)
      tile.a[g + i % 2 * 8][t + i / 2 * 4] = tf32_value(a[i]);
    tile.b[t][g] = tf32_value(own.b0);
    tile.b[t + 4][g] = tf32_value(own.b1);
  }
  tile.multiply_and_store(arguments);
}

} // namespace

const char* name_of(WarpOperation operation) {
  switch (operation) {
  case WarpOperation::sync: return "sync_warp";
  case WarpOperation::shuffle: return "shuffle";
  case WarpOperation::load_matrix: return "load_matrix_x4";
  case WarpOperation::load_matrix_transposed: return "load_matrix_x4_transposed";
  case WarpOperation::store_matrix: return "store_matrix_x4";
  case WarpOperation::store_matrix_transposed: return "store_matrix_x4_transposed";
  case WarpOperation::move_matrix: return "transpose_matrix";
  case WarpOperation::ballot: return "vote";
  case WarpOperation::set_registers: return "release_registers or take_registers";
  case WarpOperation::mma_bf16: return "mma_16x8x16<bf16>";
  case WarpOperation::mma_fp16: return "mma_16x8x16<fp16>";
  case WarpOperation::mma_tf32: return "mma_16x8x8_tf32";
  }
  return "?";
}

std::string run_operation(WarpOperation operation, void* const* arguments, const unsigned char* shared,
                          std::size_t shared_bytes) {
  switch (operation) {
  case WarpOperation::sync: return {};
  case WarpOperation::set_registers: return {};
  case WarpOperation::store_matrix: return store_matrix(arguments, false, shared, shared_bytes);
  case WarpOperation::store_matrix_transposed: return store_matrix(arguments, true, shared, shared_bytes);
  case WarpOperation::move_matrix: move_matrix(arguments); return {};
  case WarpOperation::ballot: ballot(arguments); return {};
  case WarpOperation::shuffle: shuffle(arguments); return {};
  case WarpOperation::load_matrix: return load_matrix(arguments, false, shared, shared_bytes);
  case WarpOperation::load_matrix_transposed: return load_matrix(arguments, true, shared, shared_bytes);
  case WarpOperation::mma_bf16: mma_16bit<bf16_value>(arguments); return {};
  case WarpOperation::mma_fp16: mma_16bit<fp16_value>(arguments); return {};
  case WarpOperation::mma_tf32: mma_tf32(arguments); return {};
  }
  return "unknown operation";
}

} // namespace kda::emulator
