// The parts of the emulation among each other: threads, memory and graphs.
#pragma once
#include <functional>
#include <random>
#include <string>

#include "cuda_runtime.h"

namespace emulation {

extern std::mt19937_64 random_numbers;
inline size_t random_below(size_t n) { return size_t(random_numbers() % n); }

void report(const std::string& finding);

// threads.cpp
void run(const Kernel& kernel);  // all blocks of it
bool is_in_kernel();             // a thread of a kernel runs
unsigned current_thread();       // its number in the grid
void maybe_switch();             // lets another thread run, now and then

// memory.cpp
char* allocate(size_t bytes, size_t offset, bool is_written);
void set_written(const char* address, size_t bytes);
void release(char* address);
void release_all();
void check_guards();
bool is_device_memory(const void* address);

// Ordering of memory accesses, by which races are found. Barriers order the threads of a block. A fence, then an atomic
// operation on the one side, an atomic operation, then a fence on the other side order two threads of different blocks.
void begin_ordering(unsigned n_threads);
void order_by_barrier(unsigned first, unsigned count);

}  // namespace emulation
