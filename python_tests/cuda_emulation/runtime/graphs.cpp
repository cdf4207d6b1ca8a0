// Streams and graphs: a stream runs what it is given at once or records it; a graph runs in any order that its edges
// allow.
#include "graphs.h"

#include <cstdlib>
#include <vector>

namespace emulation {

namespace {

cudaError_t last_error = cudaSuccess;
std::vector<unsigned> conditions;  // by handle

void run_node(const Node& node) {
    if (node.type == cudaGraphNodeTypeKernel && node.callback)
        node.callback(node.number);
    else if (node.type == cudaGraphNodeTypeKernel)
        run(node.kernel);
    else if (node.type == cudaGraphNodeTypeGraph)
        run_graph(*node.inner);
    else if (node.type == cudaGraphNodeTypeConditional)
        while (conditions[node.handle]) run_graph(*node.inner);
}

Node* add(Graph& graph, cudaGraphNodeType type, const cudaGraphNode_t* after, size_t count) {
    graph.nodes.push_back(std::make_unique<Node>());
    Node* const node = graph.nodes.back().get();
    node->type = type;
    node->after.assign(after, after + count);
    return node;
}

std::unique_ptr<Graph> copy_of(const Graph& graph) {
    auto copy = std::make_unique<Graph>();
    std::map<const Node*, Node*> copies;
    for (const auto& node : graph.nodes) {
        if (node->type == cudaGraphNodeTypeConditional) return nullptr;  // such a graph cannot be copied
        Node* const one = add(*copy, node->type, nullptr, 0);
        one->kernel = node->kernel;
        one->callback = node->callback;
        one->number = node->number;
        if (node->inner) one->inner = copy_of(*node->inner);
        for (Node* before : node->after) one->after.push_back(copies.at(before));
        copies[node.get()] = one;
    }
    return copy;
}

cudaError_t failed(cudaError_t error) { return last_error = error; }

}  // namespace

Node* Stream::record(cudaGraphNodeType type) {
    last = add(*capture, type, &last, last ? 1 : 0);
    return last;
}

std::shared_ptr<const void> copied(const void* from, size_t bytes) {
    void* const to = std::malloc(bytes);
    return {std::memcpy(to, from, bytes), std::free};
}

void run_graph(const Graph& graph) {
    std::map<const Node*, std::vector<const Node*>> followers;
    std::map<const Node*, size_t> n_missing;
    std::vector<const Node*> possible;
    for (const auto& node : graph.nodes) {
        n_missing[node.get()] = node->after.size();
        if (node->after.empty()) possible.push_back(node.get());
        for (const Node* before : node->after) followers[before].push_back(node.get());
    }
    while (!possible.empty()) {
        std::swap(possible[random_below(possible.size())], possible.back());
        const Node* const node = possible.back();
        possible.pop_back();
        run_node(*node);
        for (const Node* follower : followers[node])
            if (--n_missing[follower] == 0) possible.push_back(follower);
    }
}

void launch(Kernel kernel, Stream* stream) {
    if (kernel.n_blocks == 0 || kernel.n_threads == 0 || kernel.n_threads > 1024) {
        failed(cudaErrorInvalidConfiguration);
    } else if (stream && stream->capture) {
        stream->record(cudaGraphNodeTypeKernel)->kernel = std::move(kernel);
    } else {
        run(kernel);
    }
}

}  // namespace emulation

using namespace emulation;

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorName(cudaError_t) { return "an error"; }
const char* cudaGetErrorString(cudaError_t) { return "of the emulation"; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    attributes->type = is_device_memory(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (stream->capture) return failed(cudaErrorInvalidValue);
    stream->capture = new Graph;
    stream->last = nullptr;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    if (!stream->capture) return failed(cudaErrorInvalidValue);
    *graph = stream->capture;
    stream->capture = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) { return *graph = new Graph, cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    for (size_t i = 0; nodes && i < *count; ++i) nodes[i] = graph->nodes[i].get();
    *count = graph->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
    return *type = node->type, cudaSuccess;
}

cudaError_t cudaGraphMemcpyNodeGetParams(cudaGraphNode_t node, cudaMemcpy3DParms* copy) {
    return *copy = node->copy, cudaSuccess;
}

cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* inner) {
    return *inner = node->inner.get(), cudaSuccess;
}

cudaError_t cudaGraphAddNode(cudaGraphNode_t* to, cudaGraph_t graph, const cudaGraphNode_t* after, const void*,
                             size_t count, cudaGraphNodeParams* of) {
    Node* const node = *to = add(*graph, of->type, after, count);
    if (of->type == cudaGraphNodeTypeConditional) {
        node->handle = of->conditional.handle;
        node->inner = std::make_unique<Graph>();
        node->inner_address = node->inner.get();
        of->conditional.phGraph_out = &node->inner_address;
    } else {
        const auto* const entry = static_cast<const Entry*>(of->kernel.func);
        node->kernel = entry->kernel(of->kernel.gridDim, of->kernel.blockDim, of->kernel.kernelParams);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* to, cudaGraph_t graph, const cudaGraphNode_t* after,
                                       size_t count, cudaGraph_t child) {
    auto copy = copy_of(*child);
    if (!copy) return failed(cudaErrorInvalidValue);
    *to = add(*graph, cudaGraphNodeTypeGraph, after, count);
    (*to)->inner = std::move(copy);
    return cudaSuccess;
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned value,
                                             unsigned) {
    *handle = conditions.size();
    graph->assigned.push_back({*handle, value});
    conditions.push_back(value);
    return cudaSuccess;
}

void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) { conditions[handle] = value; }

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    return *executable = graph, cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    for (const auto& [handle, value] : graph->assigned) conditions[handle] = value;
    run_graph(*graph);
    return cudaSuccess;
}
