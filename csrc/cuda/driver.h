// What the kernels for CUDA take to run: the driver, found when it is first asked for. The library has no CUDA library
// as a dependency, loads where there is none, and starts nothing before the first call: processes fork after imports.
//
// While a stream is captured into a graph, launches are recorded. A kernel cannot be loaded there (a driver may
// allocate or wait for it): that raises, and what is to be captured has to have run before, which warm_up is for. Another
// thread may load one meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pmrl {
namespace cuda {

// ---- what this library holds (images.cpp.in) ----------------------------------------------------

struct Built {
  const char* names;       // of the architectures: "sm_80 sm_90 compute_90", or "" where there are no kernels
  const char* compiler;    // "nvcc 13.0.88, ptxas 12.9.86"
  const char* reason;      // why there are no kernels, or ""
  int architectures[16];   // 80, 90; up to a 0
  int ptx;                 // that of the PTX
  // The oldest CUDA whose drivers load the objects and the PTX, as cuDriverGetVersion has it.
  int object_driver, ptx_driver;
};
extern const Built kBuilt;

// A fatbin: kernels for k modalities, for all architectures.
struct Image {
  int k;
  const unsigned char* code;
};
extern const Image kImages[];  // up to one without code

// ---- the driver ---------------------------------------------------------------------------------

using Stream = void*;  // CUstream
class LoadedKernel;
using Kernel = LoadedKernel*;

// Why no kernel can run in this process, or on this device of it; or null. Both start CUDA, where there is any, and all
// that follows raises for their reasons.
const char* unavailable();
const char* unavailable(int device);

struct Device {
  int multiprocessors;
  int capability;  // 90 for 9.0
  int code;        // that of what runs there: of an object, or of the PTX
  int shared;      // bytes of a multiprocessor's shared memory
};
const Device& properties(int device);

// The stream that PyTorch has this thread use on a device.
Stream current_stream(int device);

// The kernel of that name among those for k modalities, to be launched on `stream`. It is loaded when it is first asked
// for, and stays.
Kernel kernel(int k, const char* name, Stream stream);

// Loads what a later launch with so many bytes of dynamic shared memory may need: while a graph is captured none can.
void load(int device, Kernel kernel, unsigned shared, Stream stream);

struct Grid {
  unsigned blocks;   // none: nothing is launched
  unsigned threads;  // of a block
  unsigned shared;   // bytes of dynamic shared memory of a block
};

// `arguments`: the address of each, which is read before this returns. The device need not be the thread's current one.
void launch_with(int device, Kernel kernel, const Grid& grid, Stream stream, const void* const* arguments);

template <class... Arguments>
void launch(int device, Kernel kernel, const Grid& grid, Stream stream, const Arguments&... arguments) {
  const void* const addresses[] = {static_cast<const void*>(&arguments)...};
  launch_with(device, kernel, grid, stream, addresses);
}

}  // namespace cuda
}  // namespace pmrl
