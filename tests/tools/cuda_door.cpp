// A library for tests: csrc/cuda/driver.cpp behind functions of C, with images that hold no kernels. Whatever raises there
// returns its text here, which stays until the thread's next call.
#include <exception>
#include <string>

#include "cuda/driver.h"

#ifdef PMRL_NO_KERNELS
extern const pmrl::cuda::Built pmrl::cuda::kBuilt{"", "", "nobody compiled any", {0}, 0, 0, 0};
extern const pmrl::cuda::Image pmrl::cuda::kImages[] = {{0, nullptr}};
#else
extern const pmrl::cuda::Built pmrl::cuda::kBuilt{
    "sm_86 sm_90 compute_90", "nvcc 13.0.88, ptxas 12.9.86", "", {86, 90}, 90, 12000, 12080};
static const unsigned char codes[4] = {};
extern const pmrl::cuda::Image pmrl::cuda::kImages[] = {
    {2, &codes[0]}, {4, &codes[1]}, {2, &codes[2]}, {4, &codes[3]}, {0, nullptr}};
#endif

namespace {

thread_local std::string told;

template <class F>
const char* text_of(F f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    told = error.what();
    return told.c_str();
  }
}

}  // namespace

using namespace pmrl::cuda;
#define DOOR extern "C" __attribute__((visibility("default")))

DOOR const unsigned char* code_of(int image) { return kImages[image].code; }
DOOR const char* door_unavailable(int device) { return device < 0 ? unavailable() : unavailable(device); }
DOOR const char* door_properties(int device, int* found) {
  return text_of([&] {
    const Device& x = properties(device);
    found[0] = x.multiprocessors, found[1] = x.capability, found[2] = x.code;
  });
}
DOOR const char* door_kernel(int k, const char* name, Stream stream, Kernel* found) {
  return text_of([&] { *found = kernel(k, name, stream); });
}
DOOR const char* door_stream(int device, Stream* found) { return text_of([&] { *found = current_stream(device); }); }
DOOR const char* door_launch(int device, Kernel kernel, unsigned blocks, unsigned threads, unsigned shared,
                             Stream stream, int first, double second) {
  struct {
    double x[3];
    int n;
  } third{{1.0, 2.0, second}, first};
  return text_of([&] { launch(device, kernel, {blocks, threads, shared}, stream, first, second, third); });
}
