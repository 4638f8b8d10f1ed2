// An accelerator whose memory is the CPU's: PyTorch treats its tensors as another device's, and the CPU computes.
//
// As on a GPU, tensors of two devices do not mix, generators belong to one device, and a read of the device by the host is an
// event of its own: `reads` counts them and names them, and while `forbid_reads` is set each of them is an error.
// Not covered: streams (there is one), collectives, and memory beyond its allocation.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_copy_from.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::Stream;

constexpr auto FAKE = c10::DeviceType::PrivateUse1;
const Device DEVICE(FAKE, 0);

// ---- reads of the device by the host

std::mutex reads_lock;
std::vector<std::string> reads;  // since the last call of `take_reads`
std::atomic<bool> forbidden{false};
thread_local bool in_fallback = false;  // its own copies are no reads

struct Fallback {
  bool outer = std::exchange(in_fallback, true);
  ~Fallback() { in_fallback = outer; }
};

void count_read(const std::string& name) {
  if (in_fallback) return;
  TORCH_CHECK(!forbidden, "the host reads the device in ", name);
  std::lock_guard<std::mutex> guard(reads_lock);
  reads.push_back(name);
}

std::vector<std::string> take_reads() {
  std::lock_guard<std::mutex> guard(reads_lock);
  return std::exchange(reads, {});
}

// ---- memory: new values are NaN, so that whoever uses them before they are written is found out

struct FakeAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
    if (data) std::memset(data, 0xff, size);
    return {data, data, &std::free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
FakeAllocator allocator;
REGISTER_ALLOCATOR(FAKE, &allocator)

// ---- the generator: one of the CPU under another device's name; one device, one stream; an event is the time of its record

struct FakeGenerator final : at::CPUGeneratorImpl {
  FakeGenerator() {
    device_ = DEVICE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

const at::Generator& default_generator() {
  static const auto generator = at::make_generator<FakeGenerator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<FakeGenerator>(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct GuardImpl final : c10::impl::NoOpDeviceGuardImpl<FAKE> {
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, DEVICE); }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new double;
    *static_cast<double*>(*event) = now();
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    return 1e3 * (*static_cast<double*>(end) - *static_cast<double*>(begin));
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl)

// ---- kernels of its own: memory, views, copies

Tensor on_cpu(const Tensor& tensor) {  // the same memory
  if (tensor.device().is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (to.device().is_cpu()) count_read("copy to the CPU");
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  count_read("item");
  return on_cpu(self).item();
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("as_strided", [](const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
  });
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));  // else a reshape of strided memory returns garbage
  m.impl("resize_", TORCH_FN(at::native::resize_));
}

// ---- all other operators run on the CPU, on copies of their arguments

const std::set<std::string> READING{  // the size of their result, or the result, is made of values that the host waits for
    "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal"};

template <class Visit>
void visit_tensors(const c10::IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef()) visit_tensors(item, visit);
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const bool assigns = name.rfind("aten::index_put", 0) == 0 || name == "aten::_index_put_impl_";
  const bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  at::Generator generator = default_generator();
  bool here = false, elsewhere = false, masked = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].isGenerator()) {
      generator = arguments[i].toGenerator();
      TORCH_CHECK(generator.device() == DEVICE, "a generator of device ", generator.device(), " draws for ", DEVICE);
      (*stack)[stack->size() - arguments.size() + i] = c10::IValue();
    }
    visit_tensors(arguments[i], [&](const Tensor& tensor) {
      (tensor.device().is_cpu() ? elsewhere : here) |= tensor.dim() > 0 || arguments[i].isList() || !tensor.device().is_cpu();
      masked |= assigns && arguments[i].isList() && tensor.scalar_type() == at::kBool;
    });
  }
  TORCH_CHECK(!(here && elsewhere), schema.operator_name(), ": tensors of ", DEVICE, " and of the CPU");
  // A mask whose one value is written everywhere is no index (`masked_fill`).
  masked = masked && (arguments[3].toBool() || arguments[2].toTensor().numel() != 1);
  const bool counts_repeats = name == "aten::repeat_interleave" && arguments.size() == 2 && arguments[1].isNone();
  if (masked || counts_repeats || READING.count(name)) count_read(name);

  auto cpu = at::detail::getDefaultCPUGenerator();  // draws in place of `generator`
  const auto before = draws ? cpu.get_state() : Tensor();
  if (draws) cpu.set_state(generator.get_state());
  {
    const Fallback guard;
    at::native::cpu_fallback(op, stack);
  }
  if (draws) {
    generator.set_state(cpu.get_state());
    cpu.set_state(before);
  }
}

// ---- autocast, with the lists of operators that CUDA has

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FP32_SET_OPT_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at::autocast;
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FP32_SET_OPT_DTYPE)
  AT_FORALL_PROMOTE(PROMOTE)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {  // of which PyTorch has a slow form for any device, with reads, beside CUDA's
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// ---- what Python calls

TORCH_LIBRARY(fake_accelerator, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("take_reads() -> str[]", &take_reads);
  m.def("forbid_reads(bool forbid) -> bool", [](bool forbid) { return forbidden.exchange(forbid); });
  m.def("manual_seed(int seed) -> ()", [](int64_t seed) { at::Generator(default_generator()).set_current_seed(seed); });
  m.def("get_rng_state() -> Tensor", []() { return default_generator().get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) { at::Generator(default_generator()).set_state(state); });
}

}  // namespace
