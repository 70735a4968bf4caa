/* The driver's libcuda.so.1 for machines without a GPU: as much of it as Triton's launcher and csrc/cuda/driver.cpp call.

   A launch goes to the function that the process gave `on_launch`, with the arguments as the card would get them, in the
   context that cuCtxGetCurrent tells there. Loading a binary gives out numbers, from 1 on, for its functions; `name_of`
   and `image_of` tell what is behind one.

   A process may say what the driver is like by the variables below, and sees in `calls` what was called, in order. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>

enum { MOST_FUNCTIONS = 1000, MOST_DEVICES = 8 };

typedef void Launched(size_t function, const CUlaunchConfig *grid, void **arguments);

int driver_version = 13000;
int capabilities[MOST_DEVICES] = {90, 90, 90, 90, 90, 90, 90, 90};
int multiprocessors = 132;
int devices = MOST_DEVICES;
int capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL; /* of a thread that says nothing */
int capturing = CU_STREAM_CAPTURE_STATUS_NONE; /* any stream */
int refused;                                      /* set by a launch's function: the launch fails */
char failing[64];                                 /* the name of a function that fails, with CUDA_ERROR_UNKNOWN */
char calls[1 << 16];

static Launched *launched;
static size_t functions;
static struct {
  const void *image;
  char name[100];
  unsigned shared; /* bytes that launches may ask for; 0: no such limit */
} known[MOST_FUNCTIONS];
static _Thread_local CUcontext current;

void on_launch(Launched *f) { launched = f; }
const char *name_of(size_t function) { return known[function].name; }
const void *image_of(size_t function) { return known[function].image; }

static CUresult called(const char *name) {
  static size_t end; /* of a string that a test may have emptied */
  if (!*calls) end = 0;
  if (end + strlen(name) + 2 < sizeof calls) end += sprintf(calls + end, "%s ", name);
  return strcmp(name, failing) ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN;
}

static size_t numbered(const void *image, const char *name) {
  if (++functions >= MOST_FUNCTIONS) return 0;
  known[functions].image = image;
  strncpy(known[functions].name, name, sizeof known->name - 1);
  return functions;
}

/* The primary context of each device is its number and one. */
static CUcontext primary(CUdevice device) { return (CUcontext)(size_t)(device + 1); }

CUresult cuInit(unsigned flags) { return called("cuInit"); }

CUresult cuLaunchKernelEx(const CUlaunchConfig *grid, CUfunction function, void **arguments, void **extra) {
  if (called("launch")) return CUDA_ERROR_UNKNOWN;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (!launched) return CUDA_ERROR_NOT_INITIALIZED;
  if (known[(size_t)function].shared && grid->sharedMemBytes > known[(size_t)function].shared)
    return CUDA_ERROR_INVALID_VALUE;
  refused = 0;
  launched((size_t)function, grid, arguments);
  return refused ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned X, unsigned Y, unsigned Z, unsigned x, unsigned y, unsigned z,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
  const CUlaunchConfig grid = {X, Y, Z, x, y, z, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&grid, function, arguments, extra);
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)numbered(module, name);
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *options, void **values, unsigned count,
                           CUlibraryOption *library_options, void **library_values, unsigned library_count) {
  *library = (CUlibrary)code;
  return called("cuLibraryLoadData");
}

/* Bytes of shared memory in all that a launch gets without asking, less those that a kernel may have declared. */
enum { SHARED_UNASKED = (48 - 16) << 10 };

/* There is a kernel of any name, but for those that begin with "no_". */
CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  if (!strncmp(name, "no_", 3)) return CUDA_ERROR_NOT_FOUND;
  *kernel = (CUkernel)numbered(library, name);
  known[functions].shared = SHARED_UNASKED;
  return called("cuLibraryGetKernel");
}

CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *function = (CUfunction)kernel;
  return called("cuKernelGetFunction");
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  const int is_shared = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  if (is_shared) known[(size_t)kernel].shared = value;
  return called(is_shared ? "shared" : "attribute");
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = (CUstreamCaptureMode)before;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

// By an environment variable, where the process has no other way.
static int capability(int device) {
  const char *named = getenv("PMRL_CAPABILITY");
  return named ? atoi(named) : capabilities[device];
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    switch (capability(device)) {
    case 75: *value = 64 << 10; break;
    case 80: case 87: *value = 164 << 10; break;
    case 90: case 100: case 103: *value = 228 << 10; break;
    default: *value = 100 << 10;
    }
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability(device) / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability(device) % 10; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal < devices ? called("cuDeviceGet") : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *device = (int)(size_t)current - 1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = driver_version;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = primary(device);
  return called("cuDevicePrimaryCtxRetain");
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  if (!stream) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  *status = (CUstreamCaptureStatus)capturing;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the rehearsal's driver";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *which, void **data, CUdeviceptr pointer) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
