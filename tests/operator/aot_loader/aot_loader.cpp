// Runs a package that AOTInductor made of a model with this operator, without Python.
// Usage: aot_loader PACKAGE INPUTS OUTPUTS
// INPUTS is a list of tensors that torch.save wrote, OUTPUTS one that torch.load reads.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: aot_loader PACKAGE INPUTS OUTPUTS\n";
    return 2;
  }
  std::ifstream input(argv[2], std::ios::binary);
  const std::vector<char> read((std::istreambuf_iterator<char>(input)),
                               std::istreambuf_iterator<char>());
  const c10::IValue list = torch::jit::pickle_load(read);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& tensor : list.toListRef()) {
    inputs.push_back(tensor.toTensor());
  }
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const std::vector<at::Tensor> outputs = loader.run(inputs);
  const std::vector<char> written = torch::jit::pickle_save(outputs);
  std::ofstream(argv[3], std::ios::binary).write(written.data(), written.size());
}
