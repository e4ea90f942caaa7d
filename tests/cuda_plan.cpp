// Answers, line by line, what csrc/cuda/softmax_ce_plan.h decides; test_cuda_plan.py asks.
#include <iostream>
#include <string>

#include "../csrc/cuda/softmax_ce_plan.h"

using namespace torchce::cuda::softmax_ce;

int main() {
  std::string question;
  while (std::cin >> question) {
    int64_t rows, classes, pack, multiprocessors, slots;
    std::cin >> rows >> classes >> pack >> multiprocessors >> slots;
    if (question == "forward") {
      const ForwardPlan p = plan_forward(rows, classes, int(pack), slots);
      std::cout << int(p.regime) << ' ' << p.lanes << ' ' << p.parts << ' ' << p.part << ' ' << p.blocks << '\n';
    } else if (question == "forward_across") {
      const AcrossPlan p = plan_forward_across(rows / pack, classes, int(multiprocessors), slots);
      std::cout << p.columns << ' ' << p.blocks << '\n';
    } else if (question == "backward") {
      const BackwardPlan p = plan_backward(rows, classes, int(pack), slots);
      std::cout << p.team << ' ' << p.parts << ' ' << p.part << ' ' << p.blocks << '\n';
    } else if (question == "forward_backward") {
      torchce::cuda::Properties device;
      device.multiprocessors = int(multiprocessors);
      std::cin >> device.shared_memory_of_block >> device.largest_cluster;
      const ForwardBackwardPlan p = plan_forward_backward(rows, classes, int(pack), device, device.largest_cluster);
      std::cout << p.lanes << ' ' << p.cluster << ' ' << p.kept << ' ' << p.blocks << '\n';
    } else if (question == "backward_across") {
      const BackwardPlan p = plan_backward_across(rows / pack, classes, int(multiprocessors));
      std::cout << p.team << ' ' << p.parts << ' ' << p.part << ' ' << p.blocks << '\n';
    }
    std::cout.flush();  // an answer that never comes names its question
  }
}
