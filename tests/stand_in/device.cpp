// A CUDA device without a GPU: memory of its own, counted and limited, whose tensors the CPU's kernels compute with.
// See sitecustomize.py.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

const c10::Device DEVICE(c10::kCUDA, 0);
constexpr size_t BLOCK = 512; // as CUDA's allocator rounds

// --- memory ---

struct Memory {
  std::mutex lock;
  std::unordered_map<void*, size_t> sizes;
  std::unordered_set<void*> pinned;
  size_t allocated = 0, peak = 0, limit = SIZE_MAX;
};

Memory& memory() {
  static auto* one = new Memory(); // tensors may outlive what is static
  return *one;
}

void release(void* pointer) {
  auto& all = memory();
  const std::lock_guard<std::mutex> held(all.lock);
  const auto found = all.sizes.find(pointer);
  all.allocated -= found->second;
  all.sizes.erase(found);
  std::free(pointer);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, DEVICE};
    }
    auto& all = memory();
    const size_t size = (bytes + BLOCK - 1) / BLOCK * BLOCK;
    const std::lock_guard<std::mutex> held(all.lock);
    TORCH_CHECK_WITH(
        OutOfMemoryError, size <= all.limit - std::min(all.limit, all.allocated),
        "CUDA out of memory. Tried to allocate ", size, " bytes, and ", all.allocated, " of ", all.limit, " are taken.");
    void* pointer = std::aligned_alloc(BLOCK, size);
    TORCH_CHECK(pointer != nullptr, "the machine has no memory left for the stand-in");
    std::memset(pointer, 0xff, size); // not a number, for whoever reads before writing
    all.sizes[pointer] = size;
    all.allocated += size;
    all.peak = std::max(all.peak, all.allocated);
    return {pointer, pointer, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};

void unpin(void* pointer) {
  auto& all = memory();
  const std::lock_guard<std::mutex> held(all.lock);
  all.pinned.erase(pointer);
  std::free(pointer);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = std::aligned_alloc(BLOCK, (bytes + BLOCK) / BLOCK * BLOCK);
    auto& all = memory();
    const std::lock_guard<std::mutex> held(all.lock);
    all.pinned.insert(pointer);
    return {pointer, pointer, &unpin, c10::Device(c10::kCPU)};
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};

Allocator allocator;
PinnedAllocator pinned_allocator;

// --- what torch asks of a device ---

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  c10::Device exchangeDevice(c10::Device) const override {
    return DEVICE;
  }
  c10::Device getDevice() const override {
    return DEVICE;
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, DEVICE);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, DEVICE);
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  c10::DeviceIndex current_device() const override {
    return 0;
  }
  int getNumGPUs() const override {
    return 1;
  }
  bool isPinnedPtr(const void* pointer) const override {
    auto& all = memory();
    const std::lock_guard<std::mutex> held(all.lock);
    return all.pinned.count(const_cast<void*>(pointer)) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
};

// --- operations, carried out by the CPU's kernels in the device's memory ---

Tensor on_cpu(const Tensor& tensor) {
  const auto& own = tensor.storage();
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), own.nbytes(), c10::DataPtr(own.mutable_data(), c10::Device(c10::kCPU)),
      /*allocator=*/nullptr, /*resizable=*/false);
  auto found = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = found.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  return found;
}

size_t bytes_of(const Tensor& tensor) {
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize());
}

Tensor on_device(const Tensor& made) {
  auto found = at::detail::empty_strided_generic(
      made.sizes(), made.strides(), &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), made.scalar_type());
  std::memcpy(found.mutable_data_ptr(), made.const_data_ptr(), bytes_of(made));
  return found;
}

struct Given {
  Tensor original, alias;
  bool written, empty;
};

struct Recorded {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;
  std::vector<Tensor> kept; // what the arguments are aliases of
  std::vector<std::pair<size_t, Tensor>> made; // by its number among the results
};

using Recording = std::vector<Recorded>;

std::unordered_map<int64_t, Recording> recordings;
Recording* under_way = nullptr;

void replay(int64_t number) {
  const at::AutoDispatchBelowADInplaceOrView below;
  for (auto& step : recordings.at(number)) {
    Stack stack(step.arguments.begin(), step.arguments.end());
    step.op.callBoxed(&stack);
    for (auto& [index, target] : step.made) {
      const auto& made = stack[index].toTensor();
      std::memcpy(target.mutable_data_ptr(), made.const_data_ptr(), bytes_of(made));
    }
  }
}

// Operations whose tensors may lie in two places.
bool crosses(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::copy_", "aten::index", "aten::_index_put_impl_", // by indices that lie on the CPU
      "bitsandbytes::optimizer_update_8bit_blockwise"}; // of states that are paged
  return names.count(name) > 0;
}

class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), name_(op.schema().operator_name().name) {}

  void run(Stack* stack) {
    const auto& schema = op_.schema();
    const auto count = schema.arguments().size();
    std::vector<IValue> arguments;
    for (size_t i = 0; i < count; ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      arguments.push_back(converted((*stack)[stack->size() - count + i], alias != nullptr && alias->isWrite()));
    }
    torch::jit::drop(*stack, count);
    TORCH_CHECK(
        !(on_device_ && elsewhere_) || crosses(name_),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name_, ")");
    TORCH_CHECK_WITH(
        Error, !(under_way != nullptr && elsewhere_),
        "CUDA error: operation not permitted when stream is capturing (", name_, ")");
    Stack called(arguments.begin(), arguments.end());
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      op_.callBoxed(&called);
    }
    for (auto& given : given_) {
      if (given.written && given.empty && given.alias.numel() > 0) {
        given.original.resize_(given.alias.sizes());
        std::memcpy(given.original.mutable_data_ptr(), given.alias.const_data_ptr(), bytes_of(given.alias));
      }
    }
    for (size_t i = 0; i < called.size(); ++i) {
      stack->push_back(result(called[i], i));
    }
    const bool writes = std::any_of(given_.begin(), given_.end(), [](const Given& one) { return one.written; });
    if (under_way != nullptr && (writes || !made_.empty())) {
      std::vector<Tensor> kept;
      for (auto& given : given_) {
        kept.push_back(given.original);
      }
      under_way->push_back({op_, std::move(arguments), std::move(kept), std::move(made_)});
    }
  }

 private:
  Tensor converted(const Tensor& tensor, bool written) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (!tensor.is_cuda()) {
      elsewhere_ |= tensor.dim() > 0;
      others_.push_back(tensor);
      return tensor;
    }
    on_device_ = true;
    const bool empty = tensor.numel() == 0;
    auto alias = written && empty ? at::empty(tensor.sizes(), at::TensorOptions(tensor.scalar_type())) : on_cpu(tensor);
    given_.push_back({tensor, alias, written, empty});
    return alias;
  }

  IValue converted(const IValue& value, bool written) {
    if (value.isTensor()) {
      return converted(value.toTensor(), written);
    }
    if (value.isTensorList()) {
      c10::List<Tensor> found;
      for (const Tensor& tensor : value.toTensorList()) {
        found.push_back(converted(tensor, written));
      }
      return found;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> found;
      for (const auto& entry : value.toOptionalTensorList()) {
        const std::optional<Tensor> tensor = entry;
        found.push_back(tensor ? std::optional<Tensor>(converted(*tensor, written)) : std::nullopt);
      }
      return found;
    }
    if (value.isDevice()) {
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  IValue result(const IValue& value, size_t index) {
    if (value.isTensor()) {
      return result(value.toTensor(), index);
    }
    if (value.isTensorList()) {
      c10::List<Tensor> found;
      for (const Tensor& tensor : value.toTensorList()) {
        found.push_back(result(tensor, SIZE_MAX));
      }
      return found;
    }
    return value;
  }

  Tensor result(const Tensor& tensor, size_t index) {
    const auto same = [&](const Tensor& other) { return other.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl(); };
    if (!tensor.defined() || std::any_of(others_.begin(), others_.end(), same)) {
      return tensor;
    }
    for (auto& given : given_) {
      if (tensor.unsafeGetTensorImpl() == given.alias.unsafeGetTensorImpl()) {
        return given.original;
      }
      if (tensor.storage().unsafeGetStorageImpl() == given.alias.storage().unsafeGetStorageImpl()) {
        return at::native::as_strided_tensorimpl(
            given.original, tensor.sizes(), tensor.strides(), tensor.storage_offset());
      }
    }
    TORCH_CHECK(index != SIZE_MAX || under_way == nullptr, name_, " makes a list, which is not recorded here");
    auto found = on_device(tensor);
    made_.emplace_back(index, found);
    return found;
  }

  const c10::OperatorHandle& op_;
  const std::string name_;
  bool on_device_ = false, elsewhere_ = false;
  std::vector<Given> given_;
  std::vector<Tensor> others_; // on the CPU
  std::vector<std::pair<size_t, Tensor>> made_;
};

void carry_out(const c10::OperatorHandle& op, Stack* stack) {
  Call(op).run(stack);
}

c10::Scalar local_scalar(const Tensor& tensor) {
  TORCH_CHECK(under_way == nullptr, "CUDA error: operation not permitted when stream is capturing (a number is read)");
  return at::_local_scalar_dense(on_cpu(tensor));
}

// The CPU's kernel does not widen on the way.
Tensor softmax(const Tensor& tensor, int64_t dimension, bool widened) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_softmax", "");
  Stack stack{widened ? tensor.to(c10::kFloat) : tensor, dimension, false};
  carry_out(op, &stack);
  return stack[0].toTensor();
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

} // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&carry_out>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("_softmax", &softmax);
  library.impl("resize_", &at::native::resize_);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&carry_out>());
}

// whose general implementation is made of many operations
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, library) {
  for (const auto* name : {"quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&carry_out>());
  }
}

namespace {
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
const bool ready = (c10::SetAllocator(c10::kCUDA, &allocator), true);
} // namespace

extern "C" {
size_t taken() {
  return memory().allocated;
}
size_t most_taken() {
  return memory().peak;
}
void forget_most() {
  memory().peak = memory().allocated;
}
void set_limit(size_t bytes) {
  memory().limit = bytes;
}
void begin(int64_t number) {
  under_way = &recordings[number];
}
void end() {
  under_way = nullptr;
}
void play(int64_t number) {
  replay(number);
}
void drop(int64_t number) {
  recordings.erase(number);
}
}
