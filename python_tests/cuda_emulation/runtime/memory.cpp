// Memory of the device with guards around each buffer, and the checks of every access to it by a kernel.
//
// The compiler announces the accesses: with -fsanitize=thread it calls the functions __tsan_read… and __tsan_write…,
// which are defined here instead of in its own library.
#include <sys/mman.h>

#include <map>
#include <unordered_map>
#include <vector>

#include "emulation.h"

namespace emulation {
namespace {

constexpr size_t kArenaBytes = size_t(1) << 28, kGuardBytes = 256;
constexpr unsigned kMostOrdered = 4096;  // threads; the races of larger grids are not looked for
constexpr char kGuard = char(0xCB);

enum : uint8_t { is_allocated = 1, is_written = 2 };

char* const arena = static_cast<char*>(
    mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
uint8_t* const flags = static_cast<uint8_t*>(
    mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
size_t used = 0;
std::map<char*, size_t> buffers;            // address and size
std::multimap<size_t, char*> free_buffers;  // the same, reversed

using Clock = std::vector<unsigned>;  // per thread of the grid, the last of its moments that is known

// A moment of a thread.
struct Moment {
    unsigned thread, time;
};

struct Order {
    std::shared_ptr<const Clock> known, at_fence;  // null: nothing
    Clock from_atomics;                            // takes effect at the next fence
    unsigned time = 1;
};

struct Cell {
    Moment write{0, 0};
    std::vector<Moment> reads;
};

std::vector<Order> order;
std::unordered_map<size_t, Cell> cells;        // by address, in units of four bytes
std::unordered_map<size_t, Clock> at_atomics;  // by address

void join(Clock& to, const Clock& from) {
    to.resize(order.size());
    for (size_t i = 0; i < from.size(); ++i)
        if (to[i] < from[i]) to[i] = from[i];
}

bool is_before(const Moment& moment, unsigned thread) {
    if (moment.time == 0 || moment.thread == thread) return true;
    const auto& known = order[thread].known;
    return known && (*known)[moment.thread] >= moment.time;
}

void look_for_race(size_t at, unsigned thread, bool writes) {
    Cell& cell = cells[at / 4];
    bool is_race = !is_before(cell.write, thread);
    if (writes)
        for (const Moment& read : cell.reads) is_race |= !is_before(read, thread);
    if (is_race) report(writes ? "race: a write meets another access" : "race: a read meets a write");
    const Moment now{thread, order[thread].time};
    if (writes) {
        cell.write = now;
        cell.reads.clear();
    } else if (cell.reads.empty() || cell.reads.back().thread != thread) {
        cell.reads.push_back(now);
    } else {
        cell.reads.back() = now;
    }
}

void access(const void* address, size_t bytes, bool writes) {
    const size_t at = size_t(static_cast<const char*>(address) - arena);
    if (!is_in_kernel() || at >= kArenaBytes) return;
    for (size_t i = at; i < at + bytes; ++i) {
        if (!(flags[i] & is_allocated)) return report(writes ? "write beyond a buffer" : "read beyond a buffer");
        if (!writes && !(flags[i] & is_written)) return report("read of memory that was never written");
        if (writes) flags[i] |= is_written;
    }
    if (at % (bytes < 16 ? bytes : 16)) report("address not aligned to its access");
    maybe_switch();
    if (order.empty()) return;
    for (size_t i = at / 4 * 4; i < at + bytes; i += 4) look_for_race(i, current_thread(), writes);
}

// Returns the start of a place that is aligned to 256 bytes, but for the offset.
size_t find_place(size_t bytes, size_t offset) {
    const auto found = offset ? free_buffers.end() : free_buffers.find(bytes);
    if (found != free_buffers.end()) {
        const size_t start = size_t(found->second - arena);
        free_buffers.erase(found);
        return start;
    }
    const size_t start = (used + kGuardBytes + 255) / 256 * 256 + offset;
    used = start + bytes + kGuardBytes;
    if (used > kArenaBytes) throw std::bad_alloc();
    return start;
}

}  // namespace

char* allocate(size_t bytes, size_t offset, bool written) {
    const size_t start = find_place(bytes, offset);
    char* const address = arena + start;
    std::memset(address - kGuardBytes, kGuard, bytes + 2 * kGuardBytes);
    std::memset(flags + start, is_allocated | (written ? is_written : 0), bytes);
    for (size_t i = start / 4; i <= (start + bytes) / 4; ++i) cells.erase(i);
    buffers[address] = bytes;
    return address;
}

void set_written(const char* address, size_t bytes) {
    std::memset(flags + (address - arena), is_allocated | is_written, bytes);
}

void release(char* address) {
    const auto found = buffers.find(address);
    std::memset(flags + (address - arena), 0, found->second);
    if ((address - arena) % 256 == 0) free_buffers.emplace(found->second, address);
    buffers.erase(found);
}

void release_all() {
    while (!buffers.empty()) release(buffers.begin()->first);
    free_buffers.clear();
    used = 0;
}

void check_guards() {
    for (const auto& [address, bytes] : buffers)
        for (size_t i = 0; i < kGuardBytes; ++i)
            if (address[-1 - ptrdiff_t(i)] != kGuard || address[bytes + i] != kGuard)
                return report("guard overwritten");
}

bool is_device_memory(const void* address) { return size_t(static_cast<const char*>(address) - arena) < kArenaBytes; }

void begin_ordering(unsigned n_threads) {
    order.clear();
    order.resize(n_threads <= kMostOrdered ? n_threads : 0);
    cells.clear();
    at_atomics.clear();
}

void order_by_barrier(unsigned first, unsigned count) {
    if (order.empty()) return;
    auto all = std::make_shared<Clock>(order.size());
    const void* last = nullptr;
    for (unsigned i = first; i < first + count; ++i) {
        if (order[i].known && order[i].known.get() != last) join(*all, *order[i].known);
        last = order[i].known.get();
    }
    for (unsigned i = first; i < first + count; ++i) (*all)[i] = order[i].time++;
    for (unsigned i = first; i < first + count; ++i) order[i].known = all;
}

void enter_atomic(void* address) {
    maybe_switch();
    if (order.empty()) return;
    Order& mine = order[current_thread()];
    Clock& there = at_atomics[size_t(static_cast<char*>(address) - arena)];
    join(mine.from_atomics, there);
    if (mine.at_fence) join(there, *mine.at_fence);
}

}  // namespace emulation

void __threadfence() {
    using namespace emulation;
    maybe_switch();
    if (order.empty()) return;
    const unsigned thread = current_thread();
    Order& mine = order[thread];
    auto known = std::make_shared<Clock>(mine.from_atomics);
    known->resize(order.size());
    if (mine.known) join(*known, *mine.known);
    (*known)[thread] = mine.time++;
    mine.known = mine.at_fence = known;
}

#define ACCESS(bytes)                                                                              \
    void __tsan_read##bytes(void* address) { emulation::access(address, bytes, false); }           \
    void __tsan_write##bytes(void* address) { emulation::access(address, bytes, true); }           \
    void __tsan_unaligned_read##bytes(void* address) { emulation::access(address, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* address) { emulation::access(address, bytes, true); }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) { emulation::access(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { emulation::access(address, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
uint8_t __tsan_atomic8_load(const uint8_t* address, int) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
uint32_t __tsan_atomic32_load(const uint32_t* address, int) { return *address; }
uint64_t __tsan_atomic64_load(const uint64_t* address, int) { return *address; }
void __tsan_atomic32_store(uint32_t* address, uint32_t value, int) { *address = value; }
void __tsan_atomic64_store(uint64_t* address, uint64_t value, int) { *address = value; }
uint32_t __tsan_atomic32_fetch_add(uint32_t* address, uint32_t value, int) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
}
