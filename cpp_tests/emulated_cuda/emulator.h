#pragma once

#include <setjmp.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

// CUDA kernels on the host, for machines without a GPU: what CI has. The sources of the kernels are
// compiled as plain C++ with this folder in front of the include path, so cuda_runtime.h and
// common/cuda_instructions.cuh are the ones beside this file. Meant to find wrong indices, missing
// barriers and missing waits, not to be fast:
//
//   - every thread of a block is a coroutine; blocks run one after the other;
//   - threads run in a shuffled order, some warps as far ahead of the others as barriers allow, and
//     lanes apart from each other;
//   - all lanes of a warp must meet in the same warp-wide instruction, else the program ends;
//   - shared memory starts as garbage; asynchronous copies happen as late as the waits allow, and
//     from their start on garbage is where they will arrive. Those that arrive at an mbarrier
//     happen some time, mostly when nothing else can.
namespace emulator {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// The device that kernels see.
struct Device {
  int multiprocessors = 5;
  int shared_bytes = 227 * 1024;

  int id() const { return shared_bytes / 1024; }  // devices that differ are different ones
};
inline Device device;

constexpr int kWarpLanes = 32;
constexpr int kNamedBarriers = 16;

// All shared memory is thread-local: that of a program lies in one piece, so that an address in it
// has 32 bits and all of it can be made garbage. Kernels run on one thread; nothing else of the
// program may be thread-local.
#define EMULATED_SHARED static thread_local
constexpr char kGarbage = static_cast<char>(0xa5);
constexpr char kUnderWay = 0x5a;  // where a copy will arrive
constexpr char kBarrier = 0x6b;   // what an mbarrier looks like

constexpr size_t kMaxSharedBytes = 256 * 1024;

uint32_t shared_address(const void* pointer);
char* shared_pointer(uint32_t address, size_t bytes);

inline bool is_filled(const char* data, size_t bytes, char with) {
  return std::all_of(data, data + bytes, [=](char byte) { return byte == with; });
}

// What a kernel has been allowed by cudaFuncSetAttribute, and whether a launch is one that a device
// would take.
void allow_dynamic_shared(const void* kernel, int bytes);
bool can_launch(const void* kernel, Index3 grid, Index3 block, size_t dynamic_bytes);

class Block {
 public:
  static Block& current() { return *current_; }

  // Runs body once for every thread of the block. Some thread of an overlapped launch must wait for
  // the kernel before: else the kernel behind could overtake that one.
  static void run(Index3 block, Index3 grid, Index3 threads, size_t dynamic_bytes, bool overlapped,
                  const std::function<void()>& body);

  void wait_for_previous_kernel() { waited_ = true; }

  void barrier();

  int lane() const { return running_->number % kWarpLanes; }

  // One of 16 barriers of `threads` arrivals; who does not wait goes on at once.
  void named_barrier(int id, int threads, bool waits);

  // Barriers in shared memory.
  void mbarrier_init(uint32_t address, int count);
  void mbarrier_arrive(uint32_t address);
  void mbarrier_wait(uint32_t address, uint32_t parity);
  void copies_arrive(uint32_t address);

  // All lanes of this thread's warp hand in `in`; the last to come calls combine(ins, outs), with
  // an entry a lane, then all go on with their out.
  template <typename Out, typename In, typename Combine>
  Out together(const char* what, const In& in, Combine combine) {
    Out out{};
    Warp& warp = meet(what, &in, &out);
    if (warp.arrived == warp.lanes) {
      const In* ins[kWarpLanes];
      Out* outs[kWarpLanes];
      for (int lane = 0; lane < kWarpLanes; ++lane) {
        ins[lane] = static_cast<const In*>(warp.in[lane]);
        outs[lane] = static_cast<Out*>(warp.out[lane]);
      }
      combine(ins, outs);
      release(warp);
    } else {
      wait();
    }
    return out;
  }

  // Asynchronous copies of this thread.
  void copy_later(char* target, const void* source, size_t bytes);
  void commit_copies();
  void wait_copies(size_t pending);

  // Asynchronous products of this thread, likewise: done when they are waited for.
  void product_later(std::function<void()> product);
  void commit_products();
  void wait_products(size_t pending);

  static char* dynamic_shared();

 private:
  using Products = std::vector<std::function<void()>>;

  struct Copy {
    char* target;  // null: an arrival, for all copies before
    const void* source;
    size_t bytes;
    uint32_t barrier = 0;
  };
  struct Thread {
    jmp_buf place;  // where it goes on, once it has started
    Index3 index;
    int number = 0;
    bool started = false;
    bool waits = false;
    bool done = false;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
    std::vector<Products> product_groups;
    Products open_products;
  };
  struct Warp {
    const void* in[kWarpLanes];
    void* out[kWarpLanes];
    const char* what = nullptr;
    int arrived = 0;
    int lanes = 0;
  };

  struct Named {
    int arrived = 0;
    int threads = 0;
    std::vector<Thread*> waiting;
  };

  struct MBarrier {
    int count = 0;
    int missing = 0;
    uint32_t parity = 0;  // of the phase under way
    std::vector<Thread*> waiting;
  };

  Warp& meet(const char* what, const void* in, void* out);
  void add_thread(int number, Index3 size);
  void release(Warp& warp);
  void run_threads();
  bool run_warp(size_t warp, std::mt19937& random);
  void check_end() const;
  MBarrier& mbarrier(uint32_t address);
  void perform(const Copy& copy);
  bool land_copies(Thread& thread);
  bool land_some_copies(std::mt19937& random);
  void resume(Thread& thread);
  void yield();
  void wait();
  void finish();
  static void enter();

  inline static Block* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Named named_[kNamedBarriers];
  std::map<uint32_t, MBarrier> mbarriers_;
  size_t dynamic_bytes_ = 0;
  jmp_buf scheduler_;
  Thread* running_ = nullptr;
  int alive_ = 0;
  int at_barrier_ = 0;
  bool waited_ = false;  // for the kernel before
};

// In words on stderr, then abort: a wrong kernel must not pass.
[[noreturn]] void fail(const char* format, ...);

}  // namespace emulator
