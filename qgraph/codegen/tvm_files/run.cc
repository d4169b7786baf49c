// Runs the compiled model with TVM's runtime alone.
//
//     ./run INPUT.bin... > outputs.bin
//
// One file of raw little-endian numbers for each input of signature.h, in its order; the outputs follow one another in
// outputs.bin likewise. Sizes that the model leaves open (-1) follow from the file: one for each input.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "signature.h"

namespace ffi = tvm::ffi;
using Bytes = std::vector<char>;

namespace {

const int kPooledAllocator = 2;

Bytes ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

size_t ItemBytes(const Signature& one) { return (static_cast<size_t>(one.dtype.bits) + 7) / 8; }

// Returns the sizes of a tensor, an open one computed from the number of its bytes.
std::vector<int64_t> Sizes(const Signature& one, size_t bytes) {
  std::vector<int64_t> sizes(one.shape, one.shape + one.rank);
  int64_t known = 1;
  int open = -1;
  for (int axis = 0; axis < one.rank; ++axis) {
    if (sizes[axis] >= 0) {
      known *= sizes[axis];
    } else if (open < 0) {
      open = axis;
    } else {
      sizes[axis] = 1;
    }
  }
  const int64_t count = static_cast<int64_t>(bytes / ItemBytes(one));
  if (open >= 0 && known > 0) {
    sizes[open] = count / known;
    known *= sizes[open];
  }
  if (known != count) throw std::runtime_error(std::string("wrong number of bytes for ") + one.name);
  return sizes;
}

ffi::Tensor MakeTensor(const Signature& one, const char* data, size_t bytes, DLDevice device) {
  const std::vector<int64_t> sizes = Sizes(one, bytes);
  const ffi::Optional<ffi::String> anywhere = std::nullopt;
  static const ffi::Function allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  static const ffi::Function fill = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
  ffi::Tensor made =
      allocate(ffi::Shape(sizes.begin(), sizes.end()), one.dtype, device, anywhere).cast<ffi::Tensor>();
  if (bytes > 0) fill(made, static_cast<void*>(const_cast<char*>(data)), bytes);
  return made;
}

void Write(const ffi::Tensor& tensor) {
  size_t bytes = (tensor.dtype().bits + 7) / 8;
  for (int64_t size : tensor.shape()) bytes *= static_cast<size_t>(size);
  Bytes data(bytes);
  static const ffi::Function read = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
  if (bytes > 0) read(tensor, static_cast<void*>(data.data()), bytes);
  std::cout.write(data.data(), static_cast<std::streamsize>(bytes));
}

void Run(const std::vector<std::string>& files, const std::string& folder) {
  if (files.size() != static_cast<size_t>(kInputCount)) {
    throw std::runtime_error("wants " + std::to_string(kInputCount) + " files, one for each input");
  }
  const DLDevice device{kDevice, 0};
  ffi::Module library = ffi::Module::LoadFromFile(folder + "/model.so");
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  ffi::Function initialize = machine->GetFunction("vm_initialization").value();
  if (device.device_type == kDLCPU) {
    initialize(static_cast<int>(kDLCPU), 0, kPooledAllocator);
  } else {
    initialize(static_cast<int>(device.device_type), 0, kPooledAllocator, static_cast<int>(kDLCPU), 0,
               kPooledAllocator);
  }

  std::vector<ffi::Any> arguments;
  for (int place = 0; place < kInputCount; ++place) {
    const Bytes data = ReadFile(files[place]);
    arguments.emplace_back(MakeTensor(kInputs[place], data.data(), data.size(), device));
  }
  if (kParameterCount > 0) {
    const Bytes data = ReadFile(folder + "/params.bin");
    ffi::Array<ffi::Any> stored;
    for (int place = 0; place < kParameterCount; ++place) {
      const Parameter& one = kParameters[place];
      if (one.offset + one.bytes > data.size()) throw std::runtime_error("params.bin is truncated");
      stored.push_back(MakeTensor(one.tensor, data.data() + one.offset, one.bytes, device));
    }
    ffi::Function prepare = machine->GetFunction("main_transform_params").value();
    for (const ffi::Any& one : prepare(stored).cast<ffi::Array<ffi::Any>>()) arguments.push_back(one);
  }

  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  machine->GetFunction("main").value().CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  if (auto single = result.try_cast<ffi::Tensor>()) {
    Write(*single);
  } else {
    for (const ffi::Tensor& one : result.cast<ffi::Array<ffi::Tensor>>()) Write(one);
  }
}

}  // namespace

int main(int count, char** words) {
  const char* folder = std::getenv("MODEL_FOLDER");
  try {
    Run(std::vector<std::string>(words + 1, words + count), folder == nullptr ? "." : folder);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
