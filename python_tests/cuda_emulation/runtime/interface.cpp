// Functions of the emulated library that Python calls.
#include <map>
#include <string>

#include "control/control_block.h"
#include "cuda_graph/loop_graph.h"
#include "graphs.h"
#include "kernels/ops.h"

namespace emulation {
namespace {

std::map<std::string, int> findings;

}  // namespace

void report(const std::string& finding) { ++findings[finding]; }

}  // namespace emulation

using namespace emulation;

extern "C" {

const aca::Backend* backend() { return &aca::cuda_backend(); }
int64_t control_bytes() { return sizeof(aca::Control); }

void begin(uint64_t seed, int planted_fault) {
    random_numbers.seed(seed);
    fault = planted_fault;
}

void* allocate_buffer(size_t bytes, size_t offset, int is_written) { return allocate(bytes, offset, is_written != 0); }
void mark_written(const char* address, size_t bytes) { set_written(address, bytes); }
void release_buffers() { release_all(); }

// Returns the findings since the last call, one per line.
const char* take_findings() {
    static std::string text;
    check_guards();
    text.clear();
    for (const auto& [finding, count] : findings) text += finding + " (" + std::to_string(count) + " times)\n";
    findings.clear();
    return text.c_str();
}

Stream* new_stream() { return new Stream; }
void delete_stream(Stream* stream) { delete stream; }
int is_capturing(const Stream* stream) { return stream->capture != nullptr; }
void begin_capture(Stream* stream) { cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal); }

Graph* end_capture(Stream* stream) {
    Graph* graph = nullptr;
    cudaStreamEndCapture(stream, &graph);
    return graph;
}

void restart_capture(Stream* stream) { aca::restart_capture(0, reinterpret_cast<uintptr_t>(stream)); }
void launch_graph(Graph* graph) { cudaGraphLaunch(graph, nullptr); }
void delete_graph(Graph* graph) { delete graph; }

// Records a call back to Python, in place of the kernel of an operation of torch.
void record_call(Stream* stream, void (*callback)(int), int number) {
    Node* const node = stream->record(cudaGraphNodeTypeKernel);
    node->callback = callback;
    node->number = number;
}

void record_node(Stream* stream, int type, void* copied_from, void* copied_to) {
    Node* const node = stream->record(cudaGraphNodeType(type));
    node->copy.srcPtr.ptr = copied_from;
    node->copy.dstPtr.ptr = copied_to;
}

const char* obstacle(Graph* graph) {
    static std::string text;
    text = aca::obstacle_to_loop(reinterpret_cast<uintptr_t>(graph));
    return text.c_str();
}

aca::LoopGraph* new_loop(Graph* first, Graph* body, void* control) {
    return new aca::LoopGraph(0, reinterpret_cast<uintptr_t>(first), reinterpret_cast<uintptr_t>(body),
                              reinterpret_cast<uintptr_t>(control));
}
void launch_loop(aca::LoopGraph* loop, Stream* stream) { loop->launch(reinterpret_cast<uintptr_t>(stream)); }
void delete_loop(aca::LoopGraph* loop) { delete loop; }
}
