// What the emulator finds in a kernel, and that it finds nothing in one without fault.
#include <gtest/gtest.h>

#include <vector>

#include "common/cuda_instructions.cuh"
#include "common/cuda_launch.cuh"

namespace adamix {
namespace {

struct Numbers {
  int* out;
  const int* in;
};

cudaError_t run(void (*kernel)(Numbers), int* out, const int* in, int threads = 64,
                size_t shared_bytes = 1024) {
  const Grid grid = {dim3(2), dim3(static_cast<unsigned>(threads)), shared_bytes};
  return launch(kernel, grid, nullptr, Numbers{out, in});
}

int* shared_numbers() {
  return static_cast<int*>(dynamic_shared());
}

// Numbers change hands in each way that there is: shared memory, warp, copies, named barriers.
__global__ void reverse_kernel(Numbers numbers) {
  __shared__ int first[64];
  int* second = shared_numbers();
  const int i = threadIdx.x, base = blockIdx.x * 64;
  copy_async_4(shared_address(&first[i]), numbers.in + base + i);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  second[i] = first[63 - i];
  if (i < 32) {
    barrier_arrive(3, 64);
  } else {
    barrier_sync(3, 64);
  }
  __syncthreads();
  numbers.out[base + i] = __shfl_xor_sync(0xffffffffu, second[i], 1);
}

TEST(Emulator, RunsAKernelWithoutFault) {
  std::vector<int> in(128), out(128), expected(128);
  for (int i = 0; i < 128; ++i) in[i] = i;
  for (int i = 0; i < 128; ++i) expected[i] = i / 64 * 64 + 63 - (i % 64 ^ 1);
  ASSERT_EQ(run(reverse_kernel, out.data(), in.data()), cudaSuccess);
  EXPECT_EQ(out, expected);
}

// Each thread reads what its neighbour writes.
template <bool kBarrier>
__global__ void neighbour_kernel(Numbers numbers) {
  __shared__ int shared[64];
  shared[threadIdx.x] = 1;
  if (kBarrier) __syncthreads();
  numbers.out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

TEST(Emulator, WithoutABarrierSomeReadGarbage) {
  std::vector<int> out(64);
  run(neighbour_kernel<true>, out.data(), nullptr);
  EXPECT_EQ(out, std::vector<int>(64, 1));
  run(neighbour_kernel<false>, out.data(), nullptr);
  EXPECT_NE(out, std::vector<int>(64, 1));
}

template <bool kWait>
__global__ void copy_kernel(Numbers numbers) {
  copy_async_4(shared_address(shared_numbers() + threadIdx.x), numbers.in);
  commit_copies();
  if (kWait) wait_copies<0>();
  numbers.out[threadIdx.x] = shared_numbers()[threadIdx.x];
  wait_copies<0>();
}

TEST(Emulator, BeforeTheWaitACopyHasNotArrived) {
  std::vector<int> out(64);
  const int in = 7;
  run(copy_kernel<true>, out.data(), &in);
  EXPECT_EQ(out, std::vector<int>(64, 7));
  run(copy_kernel<false>, out.data(), &in);
  EXPECT_EQ(out, std::vector<int>(64, 0x5a5a5a5a));
}

// Two mbarriers at the front of shared memory, of so many arrivals.
uint32_t begin_mbarriers(int full, int empty) {
  const uint32_t barrier = shared_address(shared_numbers());
  if (threadIdx.x == 0) mbarrier_init(barrier, full), mbarrier_init(barrier + 8, empty);
  __syncthreads();
  return barrier;
}

// One warp copies and stores a number a time, without waiting for its copies; the other adds.
__global__ void hand_over_kernel(Numbers numbers) {
  const uint32_t full = begin_mbarriers(64, 32), empty = full + 8;
  const int lane = threadIdx.x % 32;
  int* copied = shared_numbers() + 32 + lane;
  int* stored = shared_numbers() + 64;
  for (uint32_t turn = 0; turn < 5; ++turn) {
    if (threadIdx.x < 32) {
      mbarrier_wait(empty, 1 - turn % 2);  // the first time, at once
      copy_async_4(shared_address(copied), numbers.in + turn);
      copies_arrive(full);
      stored[lane] = 100;
      mbarrier_arrive(full);
    } else {
      mbarrier_wait(full, turn % 2);
      numbers.out[lane] += *copied + stored[lane ^ 1];
      mbarrier_arrive(empty);
    }
  }
}

TEST(Emulator, CopiesArriveAtAnMbarrierThoughTheirThreadDoesNotWait) {
  std::vector<int> in(64), out(64);
  for (int i = 0; i < 64; ++i) in[i] = i;
  run(hand_over_kernel, out.data(), in.data());
  std::vector<int> expected(64);
  std::fill_n(expected.begin(), 32, 2 * (0 + 1 + 2 + 3 + 4 + 500));
  EXPECT_EQ(out, expected);
}

template <bool kWait>
__global__ void late_copy_kernel(Numbers numbers) {
  const uint32_t barrier = begin_mbarriers(64, 1);
  int* copied = shared_numbers() + 32 + threadIdx.x;
  copy_async_4(shared_address(copied), numbers.in);
  copies_arrive(barrier);
  if (kWait) mbarrier_wait(barrier, 0);
  numbers.out[threadIdx.x] = *copied;
  mbarrier_wait(barrier, 0);
}

TEST(Emulator, BeforeItsArrivalACopyHasNotLanded) {
  std::vector<int> out(64);
  const int in = 7;
  run(late_copy_kernel<true>, out.data(), &in);
  EXPECT_EQ(out, std::vector<int>(64, 7));
  run(late_copy_kernel<false>, out.data(), &in);
  EXPECT_EQ(out, std::vector<int>(64, 0x5a5a5a5a));
}

// Waits for what is written by a thread that waits to be let go on.
template <uint32_t kParity>
__global__ void parity_kernel(Numbers numbers) {
  const uint32_t first = begin_mbarriers(1, 1), second = first + 8;
  int* number = shared_numbers() + 32;
  if (threadIdx.x == 0) *number = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_wait(second, 0);
    *number = 2;
    mbarrier_arrive(first);
  } else if (threadIdx.x == 32) {
    if (kParity == 0) mbarrier_arrive(second);
    mbarrier_wait(first, kParity);
    numbers.out[0] = *number;
    if (kParity == 1) mbarrier_arrive(second);
  }
}

TEST(Emulator, AWaitForTheOtherParityEndsAtOnce) {
  int out = 0;
  run(parity_kernel<0>, &out, nullptr);
  EXPECT_EQ(out, 2);
  run(parity_kernel<1>, &out, nullptr);
  EXPECT_EQ(out, 1);
}

__global__ void shared_kernel(Numbers numbers) {
  __shared__ int before;
  if (threadIdx.x == 0) numbers.out[blockIdx.x] = before, before = 1;
}

TEST(Emulator, SharedMemoryStartsAsGarbageInEveryBlock) {
  std::vector<int> out(2);
  run(shared_kernel, out.data(), nullptr);
  EXPECT_EQ(out, std::vector<int>(2, static_cast<int>(0xa5a5a5a5u)));
}

TEST(Emulator, ALaunchThatADeviceWouldRefuse) {
  int out[4] = {};
  EXPECT_NE(run(shared_kernel, out, nullptr, 1025), cudaSuccess);
  EXPECT_NE(run(shared_kernel, out, nullptr, 64, emulator::device.shared_bytes + 1), cudaSuccess);
  EXPECT_EQ(cudaFuncSetAttribute(reinterpret_cast<const void*>(shared_kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 emulator::device.shared_bytes),
            cudaSuccess);
  EXPECT_EQ(run(shared_kernel, out, nullptr, 64, emulator::device.shared_bytes), cudaSuccess);
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = dim3(1);
  config.dynamicSmemBytes = 49 * 1024;  // which nobody has allowed
  EXPECT_NE(cudaLaunchKernelEx(&config, reverse_kernel, Numbers{}), cudaSuccess);
}

// --- what ends the program -----------------------------------------------------------------------

void expect_end(void (*kernel)(Numbers), const char* why) {
  std::vector<int> in(64), out(64);
  EXPECT_DEATH(run(kernel, out.data(), in.data()), why);
}

TEST(EmulatorDeathTest, ABarrierThatNotAllReach) {
  expect_end([](Numbers) { threadIdx.x < 32 ? __syncthreads() : barrier_sync(1, 64); },
             "a barrier that not all reach");
}

TEST(EmulatorDeathTest, LanesInDifferentInstructions) {
  expect_end(
      [](Numbers) {
        if (threadIdx.x % 2 == 0) {
          __shfl_xor_sync(0xffffffffu, 1, 2);
        } else {
          __syncwarp();
        }
      },
      "lanes of one warp are in");
}

TEST(EmulatorDeathTest, AShuffleWithLanesThatHaveEnded) {
  expect_end(
      [](Numbers) {
        if (threadIdx.x % 32 != 5) __shfl_sync(0xffffffffu, 1, 0);
      },
      "a lane ended|lanes that are not there");
}

TEST(EmulatorDeathTest, ArrivalsThatNobodyWaitsFor) {
  expect_end([](Numbers) { barrier_arrive(1, 96); }, "ended with arrivals at barrier 1");
}

TEST(EmulatorDeathTest, AnArrivalThatIsMissing) {
  expect_end(
      [](Numbers) {
        const uint32_t barrier = begin_mbarriers(64, 1);
        if (threadIdx.x != 5) mbarrier_arrive(barrier);
        mbarrier_wait(barrier, 0);
      },
      "a barrier that not all reach");
  expect_end(
      [](Numbers) {
        const uint32_t barrier = begin_mbarriers(65, 1);
        copies_arrive(barrier);
        mbarrier_wait(barrier, 0);
      },
      "a barrier that not all reach");
}

TEST(EmulatorDeathTest, AnMbarrierThatIsNone) {
  expect_end([](Numbers) { mbarrier_arrive(shared_address(shared_numbers())); }, "not initialised");
  expect_end([](Numbers) { mbarrier_arrive(begin_mbarriers(1, 1) + 16); }, "not initialised");
  expect_end(
      [](Numbers) {
        const uint32_t barrier = begin_mbarriers(64, 1);
        shared_numbers()[1] = 0;
        mbarrier_arrive(barrier);
      },
      "written over");
}

TEST(EmulatorDeathTest, CopiesThatArriveWhereNobodyWaits) {
  expect_end(
      [](Numbers numbers) {
        const uint32_t barrier = begin_mbarriers(64, 1);
        copy_async_4(shared_address(shared_numbers() + 32 + threadIdx.x), numbers.in);
        copies_arrive(barrier);
      },
      "nobody waited for");
  expect_end(
      [](Numbers numbers) {
        const uint32_t barrier = begin_mbarriers(64, 1);
        copies_arrive(barrier);
        copy_async_4(shared_address(shared_numbers() + 32 + threadIdx.x), numbers.in);
        mbarrier_wait(barrier, 0);
      },
      "never committed");
}

TEST(EmulatorDeathTest, CopiesThatWereNotCommittedOrNotWaitedFor) {
  expect_end(
      [](Numbers numbers) {
        copy_async_4(shared_address(shared_numbers() + threadIdx.x), numbers.in);
      },
      "never committed");
  expect_end(
      [](Numbers numbers) {
        copy_async_4(shared_address(shared_numbers() + threadIdx.x), numbers.in);
        commit_copies();
      },
      "never waited for");
}

TEST(EmulatorDeathTest, TwoCopiesToOnePlace) {
  expect_end(
      [](Numbers numbers) {
        copy_async_4(shared_address(shared_numbers() + threadIdx.x / 2), numbers.in);
        commit_copies();
        wait_copies<0>();
      },
      "while a copy to it was under way");
}

TEST(EmulatorDeathTest, CopiesOutOfSharedMemoryOrAskew) {
  expect_end(
      [](Numbers numbers) { copy_async_4(shared_address(shared_numbers() + 256), numbers.in); },
      "behind the 1024 bytes asked for");
  expect_end([](Numbers numbers) { copy_async_4(shared_address(numbers.out), numbers.in); },
             "not in shared memory");
  expect_end(
      [](Numbers numbers) { copy_async_16(shared_address(shared_numbers() + 1), numbers.in); },
      "not multiples of it");
}

TEST(EmulatorDeathTest, AnOverlappedLaunchThatDoesNotWait) {
  const Grid grid = {dim3(1), dim3(32)};
  Device device;
  ASSERT_EQ(current_device(device), cudaSuccess);
  void (*waits)(Numbers) = [](Numbers) { wait_for_previous_kernel(); };
  void (*does_not)(Numbers) = [](Numbers) {};
  EXPECT_EQ(launch_overlapped(waits, grid, device, nullptr, Numbers{}), cudaSuccess);
  EXPECT_DEATH(launch_overlapped(does_not, grid, device, nullptr, Numbers{}), "does not wait");
}

TEST(EmulatorDeathTest, WritesBehindSharedMemory) {
  expect_end([](Numbers) { shared_numbers()[256] = 1; }, "behind the 1024 bytes asked for");
}

}  // namespace
}  // namespace adamix
