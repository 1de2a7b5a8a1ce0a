#pragma once

#include <array>
#include <numeric>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

// csrc/common/cuda_instructions.cuh on the emulator; what the functions mean stands there.
namespace adamix {

inline void mma_u8s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t a[4], b[2];
  };
  struct Out {
    int32_t c[4];
  };
  const Out sum = emulator::Block::current().together<Out>(
      "mma_u8s8", In{{a0, a1, a2, a3}, {b0, b1}}, [](const auto& ins, const auto& outs) {
        const auto byte = [](uint32_t word, int i) { return word >> 8 * i & 0xffu; };
        for (int row = 0; row < 16; ++row) {
          for (int column = 0; column < 8; ++column) {
            int32_t total = 0;
            for (int k = 0; k < 32; ++k) {
              const uint32_t a = ins[row % 8 * 4 + k % 16 / 4]->a[row / 8 + k / 16 * 2];
              const uint32_t b = ins[column * 4 + k % 16 / 4]->b[k / 16];
              total += static_cast<int32_t>(byte(a, k % 4)) * static_cast<int8_t>(byte(b, k % 4));
            }
            outs[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2] = total;
          }
        }
      });
  for (int i = 0; i < 4; ++i) c[i] += sum.c[i];
}

template <typename T>
float number_of_pair(uint32_t pair, int which) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * which);
  T number;
  std::memcpy(&number, &bits, sizeof(bits));
  return to_float(number);
}

template <typename T>
uint32_t pair_of_numbers(double low, double high) {
  const auto bits = [](double value) {
    const T number = from_float<T>(static_cast<float>(value));
    uint16_t raw;
    std::memcpy(&raw, &number, sizeof(raw));
    return uint32_t{raw};
  };
  return bits(low) | bits(high) << 16;
}

template <typename T>
void mma_pairs(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t a[4], b[2];
  };
  struct Out {
    float c[4];
  };
  const Out sum = emulator::Block::current().together<Out>(
      "mma_pairs", In{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [](const auto& ins, const auto& outs) {
        for (int row = 0; row < 16; ++row) {
          for (int column = 0; column < 8; ++column) {
            double total = 0;
            for (int k = 0; k < 16; ++k) {
              const int t = k % 8 / 2, half = k / 8;
              total +=
                  double{number_of_pair<T>(ins[row % 8 * 4 + t]->a[row / 8 + half * 2], k % 2)} *
                  number_of_pair<T>(ins[column * 4 + t]->b[half], k % 2);
            }
            outs[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2] = static_cast<float>(total);
          }
        }
      });
  for (int i = 0; i < 4; ++i) c[i] += sum.c[i];
}

// Number `column` of row `row` of the 8 x 8 matrix whose rows lanes 8i .. name.
inline uint16_t number_of_matrix(uint32_t row, int column) {
  if (row % 16 != 0) emulator::fail("a matrix row that is not aligned to 16 bytes");
  uint16_t bits;
  std::memcpy(&bits, emulator::shared_pointer(row, 16) + column * 2, sizeof(bits));
  return bits;
}

template <typename Pair>
void load_pairs_of_matrices(const char* what, uint32_t (&out)[4], uint32_t shared_row, Pair pair) {
  struct Out {
    uint32_t pair[4];
  };
  const Out loaded = emulator::Block::current().together<Out>(
      what, shared_row, [&](const auto& ins, const auto& outs) {
        for (int lane = 0; lane < emulator::kWarpLanes; ++lane) {
          for (int i = 0; i < 4; ++i) outs[lane]->pair[i] = pair(&ins[8 * i], lane);
        }
      });
  for (int i = 0; i < 4; ++i) out[i] = loaded.pair[i];
}

inline void load_matrices(uint32_t (&out)[4], uint32_t shared_row) {
  load_pairs_of_matrices("load_matrices", out, shared_row, [](const auto* rows, int lane) {
    const int column = lane % 4 * 2;
    return number_of_matrix(*rows[lane / 4], column) |
           uint32_t{number_of_matrix(*rows[lane / 4], column + 1)} << 16;
  });
}

inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t shared_row) {
  load_pairs_of_matrices("load_matrices_transposed", out, shared_row,
                         [](const auto* rows, int lane) {
                           const int row = lane % 4 * 2;
                           return number_of_matrix(*rows[row], lane / 4) |
                                  uint32_t{number_of_matrix(*rows[row + 1], lane / 4)} << 16;
                         });
}

template <typename T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [&](int i) {
    return double{number_of_pair<T>(a, i)} * number_of_pair<T>(b, i) + number_of_pair<T>(c, i);
  };
  return pair_of_numbers<T>(one(0), one(1));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A tile in lines of 128 bytes, eight lines in a row, the 16-byte chunks of line l exchanged by l.
// Along k, a line holds 64 k of a row, and eight rows are field 32 of the descriptor from the next
// eight. Else a line holds 64 rows at one k; field 32 leads to the next eight k, field 16 to the
// next 64 rows.
template <typename T, bool kAlongK>
float number_of_tile(uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1) emulator::fail("a tile that is not swizzled by 128 bytes");
  const auto field = [&](int shift) {
    return static_cast<uint32_t>(descriptor >> shift & 0x3fffu) << 4;
  };
  uint32_t address = field(0);
  if constexpr (kAlongK) {
    address += row / 8 * field(32) + row % 8 * 128 + k * 2;
  } else {
    address += row / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + row % 64 * 2;
  }
  address ^= (address >> 7 & 7u) << 4;
  uint16_t bits;
  std::memcpy(&bits, emulator::shared_pointer(address, sizeof(bits)), sizeof(bits));
  return number_of_pair<T>(bits, 0);
}

template <typename T, bool kAlongK, bool kAdd>
void wgmma_pairs(float (&d)[64], uint64_t a, uint64_t b) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  emulator::Block::current().product_later([=, sums = &d[0]] {
    const auto row_of = [](auto along_k, uint64_t descriptor, int row) {
      std::array<double, 16> numbers;
      for (int k = 0; k < 16; ++k) {
        numbers[k] = number_of_tile<T, decltype(along_k)::value>(descriptor, row, k);
      }
      return numbers;
    };
    const int first = 16 * warp + lane / 4;
    const std::array<double, 16> rows[2] = {row_of(std::true_type{}, a, first),
                                            row_of(std::true_type{}, a, first + 8)};
    for (int n = 0; n < 32; ++n) {
      const auto column =
          row_of(std::bool_constant<kAlongK>{}, b, n / 2 * 8 + lane % 4 * 2 + n % 2);
      for (int i = 0; i < 2; ++i) {
        const double sum = std::inner_product(column.begin(), column.end(), rows[i].begin(), 0.0);
        float& target = sums[n / 2 * 4 + i * 2 + n % 2];
        target = (kAdd ? target : 0.0f) + static_cast<float>(sum);
      }
    }
  });
}
inline void wgmma_begin() {}
inline void wgmma_commit() {
  emulator::Block::current().commit_products();
}
template <int kPending, int kBlocks>
void wgmma_wait(float (&)[kBlocks][64]) {
  emulator::Block::current().wait_products(kPending);
}

#endif

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void barrier_sync(int id, int threads) {
  emulator::Block::current().named_barrier(id, threads, true);
}
inline void barrier_arrive(int id, int threads) {
  emulator::Block::current().named_barrier(id, threads, false);
}
inline void mbarrier_init(uint32_t barrier, int count) {
  emulator::Block::current().mbarrier_init(barrier, count);
}
inline void mbarrier_arrive(uint32_t barrier) {
  emulator::Block::current().mbarrier_arrive(barrier);
}
inline void copies_arrive(uint32_t barrier) {
  emulator::Block::current().copies_arrive(barrier);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::Block::current().mbarrier_wait(barrier, parity);
}
inline void fence_shared_for_wgmma() {}

inline void* dynamic_shared() {
  return emulator::Block::dynamic_shared();
}

inline uint32_t shared_address(const void* pointer) {
  return emulator::shared_address(pointer);
}
inline void store_shared(uint32_t shared, const uint4& chunk) {
  if (shared % 16 != 0) emulator::fail("a chunk that is not aligned to 16 bytes");
  std::memcpy(emulator::shared_pointer(shared, 16), &chunk, 16);
}
inline void copy_async_16(uint32_t shared, const void* global) {
  emulator::Block::current().copy_later(emulator::shared_pointer(shared, 16), global, 16);
}
inline void copy_async_4(uint32_t shared, const void* global) {
  emulator::Block::current().copy_later(emulator::shared_pointer(shared, 4), global, 4);
}
inline void commit_copies() {
  emulator::Block::current().commit_copies();
}
template <int kPending>
void wait_copies() {
  emulator::Block::current().wait_copies(kPending);
}
inline void prefetch(const void*) {}
inline void wait_for_previous_kernel() {
  emulator::Block::current().wait_for_previous_kernel();
}
inline void let_next_kernel_start() {}

}  // namespace adamix
