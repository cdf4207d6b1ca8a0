// Streams and graphs of the emulation.
#pragma once
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "emulation.h"

namespace emulation {

struct Node {
    cudaGraphNodeType type;
    std::vector<Node*> after;
    Kernel kernel;
    void (*callback)(int) = nullptr;  // stands for the kernel of an operation of torch
    int number = 0;
    std::unique_ptr<Graph> inner;  // of a child graph or a conditional node
    Graph* inner_address = nullptr;
    cudaGraphConditionalHandle handle = 0;
    cudaMemcpy3DParms copy{};
};

struct Graph {
    std::vector<std::unique_ptr<Node>> nodes;
    std::vector<std::pair<cudaGraphConditionalHandle, unsigned>> assigned;  // conditions at a launch
};

struct Stream {
    Graph* capture = nullptr;
    Node* last = nullptr;

    Node* record(cudaGraphNodeType type);
};

void run_graph(const Graph& graph);

}  // namespace emulation
