// What autograd needs to be told before it works with tensors of a GPU: that there is one, and its streams.
// Stream 0 is the default one; stream 1 is the one on which a CUDA graph is being recorded.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

static Device gpu() { return Device(DeviceType::CUDA, 0); }
static thread_local c10::StreamId current = 0;  // autograd runs the backward pass in a thread of its own
extern "C" void use_stream(int id) { current = id; }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return gpu(); }
  Device exchangeDevice(Device) const override { return gpu(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::UNSAFE, gpu(), current); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::UNSAFE, gpu(), 0); }
  Stream exchangeStream(Stream next) const noexcept override {
    Stream before = getStream(gpu());
    current = next.id();
    return before;
  }
  // An event is a point in a stream's work: here only which stream, and an offset, for null means none.
  void record(void** event, const Stream& of, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(of.id() + 1);
  }
  void block(void* event, const Stream& waits) const override {
    auto of = reinterpret_cast<c10::StreamId>(event) - 1;
    TORCH_CHECK(!(of == 1 && waits.id() == 0), "CUDA error: operation would make the legacy stream depend "
                "on a capturing blocking stream");
    TORCH_CHECK(!(of == 0 && waits.id() == 1), "CUDA error: dependency created on uncaptured work in "
                "another stream");
  }
  bool queryEvent(void*) const override { return true; }
};
static c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new Guard());

namespace at {
struct Hooks final : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using CUDAHooks = Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
