#include <algorithm>
#include <cstring>

#include "emulator.h"

// What threads do not wait for at once: copies, products, and the mbarriers where both sides meet.
namespace emulator {
namespace {

constexpr size_t kBarrierBytes = 8;

}  // namespace

void Block::copy_later(char* target, const void* source, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(target) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    fail("a copy of %zu bytes between addresses that are not multiples of it", bytes);
  }
  const char* dynamic = dynamic_shared();
  if (target >= dynamic && target < dynamic + kMaxSharedBytes &&
      target + bytes > dynamic + dynamic_bytes_) {
    fail("a copy to an address behind the %zu bytes asked for", dynamic_bytes_);
  }
  std::fill_n(target, bytes, kUnderWay);  // what was there is gone from now on
  running_->open.push_back({target, source, bytes});
}

void Block::commit_copies() {
  running_->groups.push_back(std::move(running_->open));
  running_->open.clear();
}

void Block::perform(const Copy& copy) {
  if (copy.target == nullptr) return mbarrier_arrive(copy.barrier);
  if (!is_filled(copy.target, copy.bytes, kUnderWay)) {
    fail("shared memory was written while a copy to it was under way");
  }
  std::memcpy(copy.target, copy.source, copy.bytes);
}

void Block::wait_copies(size_t pending) {
  auto& groups = running_->groups;
  if (groups.size() > pending) yield();
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

void Block::copies_arrive(uint32_t address) {
  mbarrier(address);
  running_->open.push_back({nullptr, nullptr, 0, address});
}

// Up to the next arrival. False if there is none.
bool Block::land_copies(Thread& thread) {
  const auto is_arrival = [](const Copy& copy) { return copy.target == nullptr; };
  std::vector<std::vector<Copy>*> lists;
  for (auto& group : thread.groups) lists.push_back(&group);
  lists.push_back(&thread.open);
  const auto last = std::find_if(lists.begin(), lists.end(), [&](const auto* list) {
    return std::any_of(list->begin(), list->end(), is_arrival);
  });
  if (last == lists.end()) return false;
  for (auto list = lists.begin(); list != last; ++list) {
    for (const Copy& copy : **list) perform(copy);
    (*list)->clear();
  }
  const auto end = std::find_if((*last)->begin(), (*last)->end(), is_arrival) + 1;
  for (auto copy = (*last)->begin(); copy != end; ++copy) perform(*copy);
  (*last)->erase((*last)->begin(), end);
  return true;
}

// Those of some threads. False if no copies are to arrive.
bool Block::land_some_copies(std::mt19937& random) {
  const size_t first = random() % threads_.size();
  bool landed = false;
  for (size_t i = 0; i < threads_.size(); ++i) {
    if (landed && random() % 2 == 0) continue;
    landed |= land_copies(threads_[(first + i) % threads_.size()]);
  }
  return landed;
}

Block::MBarrier& Block::mbarrier(uint32_t address) {
  const auto found = mbarriers_.find(address);
  if (found == mbarriers_.end()) fail("an mbarrier that was not initialised");
  if (!is_filled(shared_pointer(address, kBarrierBytes), kBarrierBytes, kBarrier)) {
    fail("an mbarrier was written over");
  }
  return found->second;
}

void Block::mbarrier_init(uint32_t address, int count) {
  if (address % kBarrierBytes != 0) fail("an mbarrier that is not aligned to 8 bytes");
  if (count < 1) fail("an mbarrier of %d arrivals", count);
  if (mbarriers_.count(address) != 0) fail("an mbarrier that was initialised before");
  std::fill_n(shared_pointer(address, kBarrierBytes), kBarrierBytes, kBarrier);
  MBarrier& barrier = mbarriers_[address];
  barrier.count = barrier.missing = count;
}

void Block::mbarrier_arrive(uint32_t address) {
  MBarrier& barrier = mbarrier(address);
  if (--barrier.missing > 0) return;
  barrier.missing = barrier.count;
  barrier.parity ^= 1;
  for (Thread* thread : barrier.waiting) thread->waits = false;
  barrier.waiting.clear();
}

void Block::mbarrier_wait(uint32_t address, uint32_t parity) {
  if (parity > 1) fail("a parity of %u", parity);
  while (mbarrier(address).parity == parity) {
    mbarrier(address).waiting.push_back(running_);
    wait();
  }
}

void Block::product_later(std::function<void()> product) {
  running_->open_products.push_back(std::move(product));
}

void Block::commit_products() {
  running_->product_groups.push_back(std::move(running_->open_products));
  running_->open_products.clear();
}

void Block::wait_products(size_t pending) {
  auto& groups = running_->product_groups;
  if (groups.size() > pending) yield();
  while (groups.size() > pending) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}

}  // namespace emulator
