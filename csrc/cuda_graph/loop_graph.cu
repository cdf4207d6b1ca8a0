// CUDA graph whose WHILE node repeats a captured step, the check for operations that it cannot repeat, the stream of
// captures, and the recovery from a failed one.
#include <cuda_runtime.h>

#include <vector>

#include "cuda_graph/loop_graph.h"
#include "kernels/cuda_device.cuh"

#if CUDART_VERSION >= 12040
#define ACA_CONDITIONAL_NODES 1
#else
#define ACA_CONDITIONAL_NODES 0
#endif

namespace aca {
namespace {

std::vector<cudaGraphNode_t> nodes_of(cudaGraph_t graph) {
    size_t count = 0;
    check(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> nodes(count);
    check(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
    return nodes;
}

bool is_pageable(const void* address) {
    cudaPointerAttributes attributes{};
    if (!address) return false;
    if (cudaPointerGetAttributes(&attributes, address) == cudaSuccess)
        return attributes.type == cudaMemoryTypeUnregistered;
    cudaGetLastError();
    return true;
}

std::string obstacle_in_copy(cudaGraphNode_t node) {
    cudaMemcpy3DParms copy{};
    if (cudaGraphMemcpyNodeGetParams(node, &copy) != cudaSuccess) {
        cudaGetLastError();
        return "a copy whose parameters CUDA does not disclose";
    }
    if (copy.srcArray || copy.dstArray) return "a copy from or to a CUDA array";
    if (is_pageable(copy.srcPtr.ptr) || is_pageable(copy.dstPtr.ptr))
        return "a copy from or to the host's pageable memory";
    return "";
}

std::string obstacle_in(cudaGraphNode_t node) {
    cudaGraphNodeType type{};
    check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    switch (type) {
        case cudaGraphNodeTypeKernel:
        case cudaGraphNodeTypeMemset:
        case cudaGraphNodeTypeEmpty:
            return "";
        case cudaGraphNodeTypeMemcpy:
            return obstacle_in_copy(node);
        case cudaGraphNodeTypeGraph: {
            cudaGraph_t inner{};
            check(cudaGraphChildGraphNodeGetGraph(node, &inner), "cudaGraphChildGraphNodeGetGraph");
            return obstacle_to_loop(reinterpret_cast<uintptr_t>(inner));
        }
        case cudaGraphNodeTypeHost:
            return "a function call on the host";
        case cudaGraphNodeTypeMemAlloc:
        case cudaGraphNodeTypeMemFree:
            return "an allocation or release of memory";
        default:
            return "a node of type " + std::to_string(int(type));
    }
}

// Captured in place of a failed step, since torch warns about an empty capture.
__global__ void nothing_kernel() {}

#if ACA_CONDITIONAL_NODES

__global__ void set_condition_kernel(cudaGraphConditionalHandle handle, const Control* control) {
    cudaGraphSetConditional(handle, control->is_unfinished != 0);
}

cudaGraphNode_t add_node(cudaGraph_t graph, const cudaGraphNode_t* after, cudaGraphNodeParams& parameters) {
    cudaGraphNode_t node{};
#if CUDART_VERSION >= 13000
    check(cudaGraphAddNode(&node, graph, after, nullptr, after ? 1 : 0, &parameters), "cudaGraphAddNode");
#else
    check(cudaGraphAddNode(&node, graph, after, after ? 1 : 0, &parameters), "cudaGraphAddNode");
#endif
    return node;
}

cudaGraphNode_t add_copy_of(uintptr_t child, cudaGraph_t graph, const cudaGraphNode_t* after) {
    cudaGraphNode_t node{};
    check(cudaGraphAddChildGraphNode(&node, graph, after, after ? 1 : 0, reinterpret_cast<cudaGraph_t>(child)),
          "cudaGraphAddChildGraphNode");
    return node;
}

void add_condition(cudaGraph_t graph, const cudaGraphNode_t& after, cudaGraphConditionalHandle handle,
                   const Control* control) {
    void* arguments[] = {&handle, &control};
    cudaGraphNodeParams parameters{};
    parameters.type = cudaGraphNodeTypeKernel;
    parameters.kernel.func = reinterpret_cast<void*>(&set_condition_kernel);
    parameters.kernel.gridDim = dim3(1);
    parameters.kernel.blockDim = dim3(1);
    parameters.kernel.kernelParams = arguments;
    add_node(graph, &after, parameters);
}

#endif

}  // namespace

std::string obstacle_to_loop(uintptr_t graph) {
    const std::vector<cudaGraphNode_t> nodes = nodes_of(reinterpret_cast<cudaGraph_t>(graph));
    if (nodes.empty()) return "nothing";
    for (const cudaGraphNode_t node : nodes) {
        std::string obstacle = obstacle_in(node);
        if (!obstacle.empty()) return obstacle;
    }
    return "";
}

void restart_capture(int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto captured = reinterpret_cast<cudaStream_t>(stream);
    cudaGraph_t left{};
    cudaStreamEndCapture(captured, &left);  // the caller knows already that the capture failed
    cudaGetLastError();
    if (left) check(cudaGraphDestroy(left), "cudaGraphDestroy");
    cudaFuncAttributes loaded{};  // this call loads the kernel, which is not allowed inside a capture
    check(cudaFuncGetAttributes(&loaded, reinterpret_cast<const void*>(&nothing_kernel)), "cudaFuncGetAttributes");
    check(cudaStreamBeginCapture(captured, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    nothing_kernel<<<1, 1, 0, captured>>>();
    check(cudaGetLastError(), "kernel launch");
}

uintptr_t new_stream(int device) {
    const DeviceGuard guard(device);
    cudaStream_t stream{};
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return reinterpret_cast<uintptr_t>(stream);
}

bool LoopGraph::is_supported() {
    int driver = 0;
    return ACA_CONDITIONAL_NODES && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12040;
}

#if ACA_CONDITIONAL_NODES

LoopGraph::LoopGraph(int device, uintptr_t first, uintptr_t body, uintptr_t control) : device_(device) {
    const DeviceGuard guard(device);
    cudaGraph_t graph{};
    check(cudaGraphCreate(&graph, 0), "cudaGraphCreate");
    graph_ = graph;
    try {
        cudaGraphConditionalHandle handle{};
        check(cudaGraphConditionalHandleCreate(&handle, graph, 1, cudaGraphCondAssignDefault),
              "cudaGraphConditionalHandleCreate");
        cudaGraphNode_t before{};
        if (first) before = add_copy_of(first, graph, nullptr);
        cudaGraphNodeParams loop{};
        loop.type = cudaGraphNodeTypeConditional;
        loop.conditional.handle = handle;
        loop.conditional.type = cudaGraphCondTypeWhile;
        loop.conditional.size = 1;
        add_node(graph, first ? &before : nullptr, loop);
        const cudaGraph_t inside = loop.conditional.phGraph_out[0];
        const cudaGraphNode_t step = add_copy_of(body, inside, nullptr);
        add_condition(inside, step, handle, control::at<const Control>(control));
        cudaGraphExec_t executable{};
        check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
        executable_ = executable;
    } catch (...) {
        cudaGraphDestroy(graph);
        throw;
    }
}

#else

LoopGraph::LoopGraph(int device, uintptr_t, uintptr_t, uintptr_t) : device_(device) {
    throw std::runtime_error("this build cannot loop on the device: build with CUDA 12.4 or newer");
}

#endif

LoopGraph::~LoopGraph() {
    if (executable_) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
    if (graph_) cudaGraphDestroy(static_cast<cudaGraph_t>(graph_));
}

void LoopGraph::launch(uintptr_t stream) const {
    const DeviceGuard guard(device_);
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), reinterpret_cast<cudaStream_t>(stream)),
          "cudaGraphLaunch");
}

}  // namespace aca
