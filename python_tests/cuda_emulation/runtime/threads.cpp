// The threads of a kernel as fibers. Whenever one waits, or is interrupted, any other of a few blocks goes on.
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <vector>

#include "emulation.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

std::mt19937_64 random_numbers;
int fault = 0;

namespace {

constexpr size_t kStackBytes = size_t(1) << 16;
constexpr unsigned kWarp = 32;

struct Block;

struct Fiber {
    ucontext_t context;
    char* stack;
};

struct Thread {
    Block* block;
    unsigned number;  // in the block
    Fiber* fiber = nullptr;
    bool has_ended = false;
    uint64_t given = 0, received = 0;  // by a shuffle
    unsigned offset = 0;
};

struct Block {
    unsigned number, n_waiting = 0, n_ended = 0;
    std::vector<Thread> threads;
    std::vector<std::vector<Thread*>> shuffling;  // of each warp
    std::map<int, char*> shared;

    Block(unsigned number, unsigned n_threads) : number(number), threads(n_threads), shuffling(n_threads / kWarp + 1) {
        for (unsigned i = 0; i < n_threads; ++i) threads[i].block = this, threads[i].number = i;
    }
    ~Block() {
        for (const auto& [line, address] : shared) release(address);
    }
};

std::vector<Fiber*> idle_fibers;
std::vector<Thread*> ready;
const Kernel* running = nullptr;
Thread* current = nullptr;
ucontext_t scheduler;

// Leaves the current thread; it goes on when the scheduler chooses it.
void leave() { swapcontext(&current->fiber->context, &scheduler); }

void run_thread() {
    running->call(running->arguments.get());
    current->has_ended = true;
    leave();
}

Fiber* new_fiber() {
    if (idle_fibers.empty()) {
        auto* const fiber = new Fiber;
        fiber->stack = static_cast<char*>(
            mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        idle_fibers.push_back(fiber);
    }
    Fiber* const fiber = idle_fibers.back();
    idle_fibers.pop_back();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_thread, 0);
    return fiber;
}

void go_on(Thread* thread) {
    current = thread;
    threadIdx = dim3(thread->number);
    blockIdx = dim3(thread->block->number);
    if (!thread->fiber) thread->fiber = new_fiber();
    swapcontext(&scheduler, &thread->fiber->context);
    current = nullptr;
    if (!thread->has_ended) return;
    idle_fibers.push_back(thread->fiber);
    ++thread->block->n_ended;
}

void be_ready(Thread* thread) { ready.push_back(thread); }

Thread* any_ready() {
    std::swap(ready[random_below(ready.size())], ready.back());
    Thread* const thread = ready.back();
    ready.pop_back();
    return thread;
}

void complete_shuffle(std::vector<Thread*>& lanes) {
    for (Thread* lane : lanes) {
        lane->received = lane->given;
        for (const Thread* other : lanes)
            if (other->number == lane->number + lane->offset) lane->received = other->given;
    }
    for (Thread* lane : lanes) be_ready(lane);
    lanes.clear();
}

}  // namespace

bool is_in_kernel() { return current != nullptr; }

unsigned current_thread() { return current->block->number * running->n_threads + current->number; }

void maybe_switch() {
    if (random_below(64)) return;
    be_ready(current);
    leave();
}

void* shared_memory(int line, size_t bytes) {
    char*& address = current->block->shared[line];
    if (!address) address = allocate(bytes, 0, false);
    return address;
}

uint64_t shuffle_down(unsigned mask, uint64_t value, unsigned offset) {
    Thread* const me = current;
    auto& lanes = me->block->shuffling[me->number / kWarp];
    me->given = value;
    me->offset = offset;
    lanes.push_back(me);
    if (lanes.size() == size_t(__builtin_popcount(mask))) complete_shuffle(lanes);
    leave();
    return me->received;
}

// Runs the blocks in any order, a few at a time, as multiprocessors do.
void run(const Kernel& kernel) {
    running = &kernel;
    blockDim = dim3(kernel.n_threads);
    gridDim = dim3(kernel.n_blocks);
    begin_ordering(kernel.n_blocks * kernel.n_threads);
    std::vector<unsigned> waiting(kernel.n_blocks);
    for (unsigned i = 0; i < kernel.n_blocks; ++i) waiting[i] = i;
    const size_t n_resident = 1 + random_below(4);
    std::vector<std::unique_ptr<Block>> resident;
    while (!waiting.empty() || !ready.empty()) {
        while (resident.size() < n_resident && !waiting.empty()) {
            std::swap(waiting[random_below(waiting.size())], waiting.back());
            resident.push_back(std::make_unique<Block>(waiting.back(), kernel.n_threads));
            waiting.pop_back();
            for (Thread& thread : resident.back()->threads) be_ready(&thread);
        }
        if (ready.empty()) break;
        Thread* const thread = any_ready();
        go_on(thread);
        if (thread->block->n_ended < kernel.n_threads) continue;
        for (auto& block : resident)
            if (block.get() == thread->block) std::swap(block, resident.back());
        resident.pop_back();
    }
    if (!resident.empty()) report("threads wait for others of their block that have ended");
    running = nullptr;
}

}  // namespace emulation

void __syncthreads() {
    using namespace emulation;
    Block& block = *current->block;
    if (++block.n_waiting == block.threads.size()) {
        block.n_waiting = 0;
        order_by_barrier(block.number * running->n_threads, running->n_threads);
        for (Thread& thread : block.threads) be_ready(&thread);
    }
    leave();
}
