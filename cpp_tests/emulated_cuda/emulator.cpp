#include "emulator.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>

#include "cuda_runtime.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxGridRows = 65535;          // y and z
constexpr size_t kFreeSharedBytes = 48 * 1024;  // more must be allowed
constexpr size_t kGuardBytes = 4096;            // behind what was asked for

alignas(1024) EMULATED_SHARED char dynamic_memory[kMaxSharedBytes + kGuardBytes];

struct Piece {
  char* begin = nullptr;
  char* end = nullptr;
};

// The thread-local variables of the program itself, which the loader names first.
Piece shared_memory() {
  static const Piece piece = [] {
    Piece found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
            auto* begin = static_cast<char*>(info->dlpi_tls_data);
            *static_cast<Piece*>(data) = {begin, begin + info->dlpi_phdr[i].p_memsz};
          }
          return 1;
        },
        &found);
    return found;
  }();
  return piece;
}

size_t& allowed_bytes(const void* kernel) {
  static std::map<std::pair<const void*, int>, size_t> allowed;
  return allowed[{kernel, device.id()}];
}

// Kept from block to block: what is not touched costs nothing.
char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

}  // namespace

void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::fputs("emulated CUDA: ", stderr);
  std::vfprintf(stderr, format, args);
  std::fputs("\n", stderr);
  va_end(args);
  std::abort();
}

uint32_t shared_address(const void* pointer) {
  const auto* byte = static_cast<const char*>(pointer);
  if (byte < shared_memory().begin || byte >= shared_memory().end) {
    fail("an address that is not in shared memory");
  }
  return static_cast<uint32_t>(byte - shared_memory().begin);
}

char* shared_pointer(uint32_t address, size_t bytes) {
  char* pointer = shared_memory().begin + address;
  if (pointer + bytes > shared_memory().end) fail("an address out of shared memory");
  return pointer;
}

void allow_dynamic_shared(const void* kernel, int bytes) {
  allowed_bytes(kernel) = static_cast<size_t>(bytes);
}

bool can_launch(const void* kernel, Index3 grid, Index3 block, size_t dynamic_bytes) {
  const size_t allowed = std::max(kFreeSharedBytes, allowed_bytes(kernel));
  const size_t threads = size_t{block.x} * block.y * block.z;
  return dynamic_bytes <= std::min(allowed, static_cast<size_t>(device.shared_bytes)) &&
         threads > 0 && threads <= kMaxThreads && grid.x > 0 && grid.y > 0 && grid.z > 0 &&
         grid.y <= kMaxGridRows && grid.z <= kMaxGridRows;
}

char* Block::dynamic_shared() {
  return dynamic_memory;
}

void Block::enter() {
  Block& block = current();
  (*block.body_)();
  block.finish();
}

void Block::add_thread(int number, Index3 size) {
  Thread& thread = threads_[static_cast<size_t>(number)];
  const auto n = static_cast<unsigned>(number);
  thread.number = number;
  thread.index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
  ++warps_[static_cast<size_t>(number / kWarpLanes)].lanes;
}

void Block::run(Index3 block_index, Index3 grid, Index3 size, size_t dynamic_bytes, bool overlapped,
                const std::function<void()>& body) {
  Block block;
  current_ = &block;
  block.body_ = &body;
  const int threads = static_cast<int>(size.x * size.y * size.z);
  block.threads_.resize(static_cast<size_t>(threads));
  block.warps_.resize(static_cast<size_t>((threads + kWarpLanes - 1) / kWarpLanes));
  block.dynamic_bytes_ = dynamic_bytes;
  std::fill(shared_memory().begin, shared_memory().end, kGarbage);
  block.alive_ = threads;
  blockIdx = {block_index.x, block_index.y, block_index.z};
  blockDim = {size.x, size.y, size.z};
  gridDim = {grid.x, grid.y, grid.z};
  for (int i = 0; i < threads; ++i) block.add_thread(i, size);
  block.run_threads();
  block.check_end();
  if (overlapped && !block.waited_) fail("an overlapped launch that does not wait");
  current_ = nullptr;
}

// In another order from block to block and from launch to launch, the same in every run.
void Block::run_threads() {
  static std::mt19937 random;
  std::vector<size_t> order(warps_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  while (alive_ > 0) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (const size_t warp : order) {
      const bool goes_ahead = random() % 2 == 0;
      while (run_warp(warp, random)) {
        moved = true;
        if (!goes_ahead) break;
      }
    }
    if (!moved || random() % 8 == 0) moved |= land_some_copies(random);
    if (!moved) fail("no thread of block %u can go on: a barrier that not all reach", blockIdx.x);
  }
}

// Each lane once, up to where it waits or yields; some stay behind. False if none could.
bool Block::run_warp(size_t warp, std::mt19937& random) {
  const size_t first = warp * kWarpLanes, start = random() % kWarpLanes;
  const size_t stride = random() % kWarpLanes | 1;  // reaches every lane
  bool moved = false;
  for (size_t i = 0; i < kWarpLanes; ++i) {
    const size_t number = first + (start + i * stride) % kWarpLanes;
    if (number >= threads_.size()) continue;
    Thread& thread = threads_[number];
    if (thread.done || thread.waits) continue;
    moved = true;
    if (random() % 16 != 0) resume(thread);
  }
  return moved;
}

void Block::check_end() const {
  for (const Thread& thread : threads_) {
    const bool landed = std::all_of(thread.groups.begin(), thread.groups.end(),
                                    [](const auto& group) { return group.empty(); });
    if (!landed || !thread.open.empty()) {
      fail("the block ended with copies that nobody waited for");
    }
  }
  for (int id = 0; id < kNamedBarriers; ++id) {
    if (named_[id].arrived != 0) fail("the block ended with arrivals at barrier %d", id);
  }
  if (!is_filled(dynamic_memory + dynamic_bytes_, kGuardBytes, kGarbage)) {
    fail("shared memory behind the %zu bytes asked for was written", dynamic_bytes_);
  }
}

// Until the thread waits or ends. Only its first step is one of ucontext, which asks the kernel for
// the signal mask every time.
void Block::resume(Thread& thread) {
  running_ = &thread;
  threadIdx = thread.index;
  if (_setjmp(scheduler_) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stack_of(static_cast<size_t>(thread.number));
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, &Block::enter, 0);
  setcontext(&start);
}

// Lets the others run.
void Block::yield() {
  if (_setjmp(running_->place) == 0) _longjmp(scheduler_, 1);
}

void Block::wait() {
  running_->waits = true;
  yield();
}

void Block::finish() {
  Thread& thread = *running_;
  Warp& warp = warps_[static_cast<size_t>(thread.number / kWarpLanes)];
  thread.groups.erase(std::remove_if(thread.groups.begin(), thread.groups.end(),
                                     [](const auto& group) { return group.empty(); }),
                      thread.groups.end());
  const bool arrives = !thread.open.empty() && thread.open.back().target == nullptr;
  if (!thread.open.empty() && !arrives) fail("a thread ended with copies that it never committed");
  if (!thread.groups.empty() && !arrives && thread.groups.back().back().target != nullptr) {
    fail("a thread ended with copies that it never waited for");
  }
  if (!thread.open_products.empty() || !thread.product_groups.empty()) {
    fail("a thread ended with products that it never waited for");
  }
  if (warp.arrived > 0) fail("a lane ended while others of its warp are in %s", warp.what);
  thread.done = true;
  --alive_;
  --warp.lanes;
  if (alive_ > 0 && at_barrier_ == alive_) {  // the others wait for this one
    at_barrier_ = 0;
    for (Thread& other : threads_) other.waits = false;
  }
  _longjmp(scheduler_, 1);
}

void Block::barrier() {
  if (++at_barrier_ < alive_) return wait();
  at_barrier_ = 0;
  for (Thread& thread : threads_) thread.waits = false;
}

void Block::named_barrier(int id, int threads, bool waits) {
  if (id < 0 || id >= kNamedBarriers || threads % kWarpLanes != 0)
    fail("there is no barrier %d", id);
  Named& named = named_[id];
  if (named.arrived > 0 && named.threads != threads) {
    fail("barrier %d of %d threads and of %d", id, named.threads, threads);
  }
  named.threads = threads;
  if (++named.arrived == threads) {
    for (Thread* thread : named.waiting) thread->waits = false;
    named.waiting.clear();
    named.arrived = 0;
  } else if (waits) {
    named.waiting.push_back(running_);
    wait();
  }
}

Block::Warp& Block::meet(const char* what, const void* in, void* out) {
  Warp& warp = warps_[static_cast<size_t>(running_->number / kWarpLanes)];
  if (warp.arrived == 0) {
    warp.what = what;
  } else if (std::strcmp(warp.what, what) != 0) {
    fail("lanes of one warp are in %s and in %s", warp.what, what);
  }
  if (warp.lanes != kWarpLanes) fail("%s with lanes that are not there", what);
  warp.in[lane()] = in;
  warp.out[lane()] = out;
  ++warp.arrived;
  return warp;
}

void Block::release(Warp& warp) {
  warp.arrived = 0;
  const int first = running_->number / kWarpLanes * kWarpLanes;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    threads_[static_cast<size_t>(first + lane)].waits = false;
  }
}

}  // namespace emulator
