#include "driver.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "../common/constants.h"

namespace pmrl {
namespace cuda {
namespace {

// As cuda.h has them, which building this does not take. Names are those of the driver's symbols.
using Result = int;
using Context = void*;
constexpr Result kNotFound = 500;
constexpr int kRelaxed = 2;                      // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kMultiprocessors = 16;             // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kShared = 81;                      // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
constexpr int kMajor = 75, kMinor = 76;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kMostSharedAttribute = 8;          // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kMostDevices = 128;                // PyTorch's indices are of 8 bits

std::string release(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

struct Driver {
  Result (*cuInit)(unsigned);
  Result (*cuDriverGetVersion)(int*);
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuDeviceGet)(int*, int);
  Result (*cuDeviceGetAttribute)(int*, int, int);
  Result (*cuDevicePrimaryCtxRetain)(Context*, int);
  Result (*cuCtxGetCurrent)(Context*);
  Result (*cuCtxSetCurrent)(Context);
  Result (*cuThreadExchangeStreamCaptureMode)(int*);
  Result (*cuStreamIsCapturing)(Stream, int*);
  Result (*cuLibraryLoadData)(void**, const void*, int*, void**, unsigned, int*, void**, unsigned);
  Result (*cuLibraryGetKernel)(void**, void*, const char*);
  Result (*cuKernelGetFunction)(void**, void*);
  Result (*cuKernelSetAttribute)(int, int, void*, int);
  Result (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**,
                           void**);
  int32_t (*current_stream)(int32_t, void**);  // PyTorch's
  int version = 0;
  std::string reason;  // why there is none of all that

  Driver() { reason = find(); }

  std::string find() {
    if (*kBuilt.reason) return std::string("this library was built without kernels for CUDA: ") + kBuilt.reason;
    // PyTorch's libraries are loaded with it, so where one is not, it was built without. For HIP it calls devices "cuda"
    // too.
    if (dlopen("libtorch_hip.so", RTLD_LAZY | RTLD_NOLOAD)) return "PyTorch was built for HIP, and these kernels for CUDA";
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return "PyTorch was built without CUDA";
    if (!look_up(torch, current_stream, "aoti_torch_get_current_cuda_stream"))
      return "PyTorch does not tell its streams: it has no aoti_torch_get_current_cuda_stream";
    void* cuda = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!cuda) {
      const char* told = dlerror();
      return std::string("there is no CUDA driver: ") + (told ? told : "libcuda.so.1");
    }
    const char* lacking = nullptr;
    const auto want = [&](auto& function, const char* name) {
      if (!look_up(cuda, function, name) && !lacking) lacking = name;
    };
#define PMRL_WANT(name) want(name, #name)
    PMRL_WANT(cuInit), PMRL_WANT(cuDriverGetVersion), PMRL_WANT(cuGetErrorString), PMRL_WANT(cuDeviceGet);
    PMRL_WANT(cuDeviceGetAttribute), PMRL_WANT(cuDevicePrimaryCtxRetain), PMRL_WANT(cuCtxGetCurrent);
    PMRL_WANT(cuCtxSetCurrent), PMRL_WANT(cuThreadExchangeStreamCaptureMode), PMRL_WANT(cuStreamIsCapturing);
    PMRL_WANT(cuLibraryLoadData), PMRL_WANT(cuLibraryGetKernel), PMRL_WANT(cuKernelGetFunction);
    PMRL_WANT(cuKernelSetAttribute), PMRL_WANT(cuLaunchKernel);
#undef PMRL_WANT
    if (lacking) return std::string("the CUDA driver is too old: wanted one of CUDA 12.0 or newer, this has no ") + lacking;
    if (const Result error = cuInit(0)) return "CUDA cannot be started: " + text(error);
    if (const Result error = cuDriverGetVersion(&version)) return "the CUDA driver tells no version: " + text(error);
    return "";
  }

  template <class Function>
  static bool look_up(void* library, Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function;
  }

  std::string text(Result error) const {
    const char* told = nullptr;
    cuGetErrorString(error, &told);
    return told ? told : "error " + std::to_string(error);
  }

  void check(Result error, const char* what, const char* name = "") const {
    STD_TORCH_CHECK(!error, "pmrl_kernels: ", what, name, ": ", text(error));
  }
};

// Made by the first call, not when the library is loaded; and, like all that follows, never taken down: at a process's
// end other threads may still be calling.
const Driver& asked() {
  static const Driver* const found = new Driver;
  return *found;
}

const Driver& driver() {
  const Driver& found = asked();
  STD_TORCH_CHECK(found.reason.empty(), "pmrl_kernels: ", found.reason);
  return found;
}

struct KnownDevice {
  std::once_flag once;
  int ordinal = 0;
  Device properties{};
  std::string reason;
  std::mutex mutex;
  std::atomic<Context> primary{nullptr};  // retained for good, as the CUDA runtime does

  void look(const Driver& d, int device) {
    int major = 0, minor = 0;
    Result error = d.cuDeviceGet(&ordinal, device);
    if (!error) error = d.cuDeviceGetAttribute(&properties.multiprocessors, kMultiprocessors, ordinal);
    if (!error) error = d.cuDeviceGetAttribute(&major, kMajor, ordinal);
    if (!error) error = d.cuDeviceGetAttribute(&minor, kMinor, ordinal);
    if (!error) error = d.cuDeviceGetAttribute(&properties.shared, kShared, ordinal);
    if (error) {
      reason = "cuda:" + std::to_string(device) + " cannot be asked for its properties: " + d.text(error);
      return;
    }
    properties.capability = 10 * major + minor;
    // Code for an older minor number runs on a newer one.
    bool object = false;
    properties.code = kBuilt.ptx;
    for (const int* code = kBuilt.architectures; *code; ++code) {
      if (*code / 10 != major || *code > properties.capability || (object && *code < properties.code)) continue;
      object = true;
      properties.code = *code;
    }
    const int needed = object ? kBuilt.object_driver : kBuilt.ptx_driver;
    const std::string card = "compute capability " + std::to_string(major) + "." + std::to_string(minor);
    if (!object && properties.capability < kBuilt.ptx)
      reason = "this library has no code for " + card + ", its kernels are for " + kBuilt.names;
    else if (d.version < needed)
      reason = "the CUDA driver is too old: it is of CUDA " + release(d.version) + ", and for " + card + " " +
               kBuilt.compiler + " compiled for drivers of CUDA " + release(needed) + " or newer";
    else if (has_fast_float64(properties.code) && !has_fast_float64(properties.capability))
      reason = "float64 is slow on compute capability " + std::to_string(major) + "." + std::to_string(minor) +
               ", and what this library has for it, compiled for " + std::to_string(properties.code / 10) + "." +
               std::to_string(properties.code % 10) + ", sums in float64";
  }

  Context context(const Driver& d) {
    Context found = primary.load(std::memory_order_acquire);
    if (found) return found;
    const std::lock_guard<std::mutex> lock(mutex);
    found = primary.load(std::memory_order_relaxed);
    if (!found) {
      d.check(d.cuDevicePrimaryCtxRetain(&found, ordinal), "a device cannot be started");
      primary.store(found, std::memory_order_release);
    }
    return found;
  }
};

KnownDevice& known(const Driver& d, int device) {
  static KnownDevice* const devices = new KnownDevice[kMostDevices];
  STD_TORCH_CHECK(device >= 0 && device < kMostDevices, "pmrl_kernels: device must be in 0..", kMostDevices - 1, ", got ",
                  device);
  KnownDevice& found = devices[device];
  std::call_once(found.once, [&] { found.look(d, device); });
  return found;
}

KnownDevice& usable(const Driver& d, int device) {
  KnownDevice& found = known(d, device);
  STD_TORCH_CHECK(found.reason.empty(), "pmrl_kernels: ", found.reason);
  return found;
}

// Makes a device's context the thread's. One that had none keeps it, as after a call of the CUDA runtime: such are
// autograd's threads, where all memory comes from PyTorch's cache. Another device's comes back at the end.
class OnDevice {
 public:
  OnDevice(const Driver& d, KnownDevice& device) : driver_(d) {
    const Context wanted = device.context(d);
    d.check(d.cuCtxGetCurrent(&before_), "the current context");
    if (before_ == wanted) {
      before_ = nullptr;
      return;
    }
    d.check(d.cuCtxSetCurrent(wanted), "a device's context");
  }
  ~OnDevice() {
    if (before_) driver_.cuCtxSetCurrent(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const Driver& driver_;
  Context before_ = nullptr;
};

// Where something is loaded: not in a capture of this stream; but whatever other threads capture, which by default forbids
// a thread to allocate.
class Uncaptured {
 public:
  Uncaptured(const Driver& d, Stream stream, const char* name) : driver_(d) {
    int capturing = 0;
    if (stream && driver_.cuStreamIsCapturing(stream, &capturing)) capturing = 0;  // of no stream it is an error to ask
    STD_TORCH_CHECK(!capturing, "pmrl_kernels: ", name, " is not loaded yet, and cannot be while a CUDA graph is captured; "
                    "call pmrl_kernels.warm_up, or the same function on such embeddings, before that");
    driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  ~Uncaptured() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kRelaxed;
};

struct LoadedImage {
  std::mutex mutex;
  void* library = nullptr;
  std::map<std::string, std::unique_ptr<LoadedKernel>, std::less<>> kernels;
};

}  // namespace

class LoadedKernel {
 public:
  LoadedKernel(std::string name, void* handle) : name_(std::move(name)), handle_(handle) {}

  // With the context of the device that is current. A driver loads code into one when that is first asked for: here,
  // and not in the midst of a launch.
  void* prepared(const Driver& d, int device, int ordinal, unsigned shared, Stream stream) {
    if (!loaded_[device].load(std::memory_order_acquire)) {
      const Uncaptured relaxed(d, stream, name_.c_str());
      void* function = nullptr;
      d.check(d.cuKernelGetFunction(&function, handle_), "loading ", name_.c_str());
      loaded_[device].store(true, std::memory_order_release);
    }
    // Without that attribute it would have to fit into 48 KB beside what the kernel declares.
    if (shared > shared_[device].load(std::memory_order_acquire)) {
      d.check(d.cuKernelSetAttribute(kMostSharedAttribute, static_cast<int>(shared), handle_, ordinal),
              "shared memory of ", name_.c_str());
      shared_[device].store(shared, std::memory_order_release);
    }
    return handle_;
  }
  const char* name() const { return name_.c_str(); }

 private:
  std::string name_;
  void* handle_;
  std::atomic<bool> loaded_[kMostDevices] = {};
  std::atomic<unsigned> shared_[kMostDevices] = {};
};

const char* unavailable() {
  const Driver& d = asked();
  return d.reason.empty() ? nullptr : d.reason.c_str();
}

const char* unavailable(int device) {
  if (const char* reason = unavailable()) return reason;
  const KnownDevice& found = known(asked(), device);
  return found.reason.empty() ? nullptr : found.reason.c_str();
}

const Device& properties(int device) { return usable(driver(), device).properties; }

Kernel kernel(int k, const char* name, Stream stream) {
  const Driver& d = driver();
  static LoadedImage* const loaded = [] {
    size_t count = 0;
    while (kImages[count].code) ++count;
    return new LoadedImage[count];
  }();
  for (size_t i = 0; kImages[i].code; ++i) {
    if (kImages[i].k != k) continue;
    LoadedImage& image = loaded[i];
    const std::lock_guard<std::mutex> lock(image.mutex);
    const auto at = image.kernels.find(name);
    if (at != image.kernels.end()) return at->second.get();
    const Uncaptured relaxed(d, stream, name);
    if (!image.library)
      d.check(d.cuLibraryLoadData(&image.library, kImages[i].code, nullptr, nullptr, 0, nullptr, nullptr, 0),
              "the kernels for k = ", std::to_string(k).c_str());
    void* handle = nullptr;
    const Result error = d.cuLibraryGetKernel(&handle, image.library, name);
    if (error == kNotFound) continue;  // another file's
    d.check(error, "kernel ", name);
    return (image.kernels[name] = std::make_unique<LoadedKernel>(name, handle)).get();
  }
  STD_TORCH_CHECK(false, "pmrl_kernels: no kernel ", name, " for k = ", k);
}

Stream current_stream(int device) {
  const Driver& d = driver();
  Stream stream = nullptr;
  STD_TORCH_CHECK(d.current_stream(device, &stream) == 0, "pmrl_kernels: PyTorch tells no stream of cuda:", device);
  return stream;
}

void load(int device, Kernel kernel, unsigned shared, Stream stream) {
  const Driver& d = driver();
  KnownDevice& found = usable(d, device);
  const OnDevice here(d, found);
  kernel->prepared(d, device, found.ordinal, shared, stream);
}

void launch_with(int device, Kernel kernel, const Grid& grid, Stream stream, const void* const* arguments) {
  if (!grid.blocks) return;
  const Driver& d = driver();
  KnownDevice& found = usable(d, device);
  const OnDevice here(d, found);
  void* handle = kernel->prepared(d, device, found.ordinal, grid.shared, stream);
  // The driver reads arguments and writes none.
  d.check(d.cuLaunchKernel(handle, grid.blocks, 1, 1, grid.threads, 1, 1, grid.shared, stream,
                           const_cast<void**>(arguments), nullptr),
          "launching ", kernel->name());
}

}  // namespace cuda
}  // namespace pmrl
