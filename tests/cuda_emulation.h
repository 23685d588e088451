// Stands in for CUDA when a native.cu is compiled by a C++ compiler: what kernels/native_cuda.h takes from CUDA, on one
// thread of the host.
//
// Blocks run one after another. The threads of a block are contexts that run in turn until they end or come to
// __syncthreads(), and go on when all have come. What a GPU punishes is an error of the launch here, too: a packet that is
// not aligned, a barrier that some threads do not reach. Threads run in ascending or descending order, at the caller's
// choice: a missing barrier makes the two differ. Dynamic shared memory is filled with ones before each block.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define DGF_DYNAMIC_SHARED(name) unsigned char* const name = emulation::shared_memory()
#define DGF_TOUCH(address, alignment) emulation::touch(address, alignment)
#ifndef DGF_THREADS
#define DGF_THREADS 32
#endif

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMisalignedAddress = 716, cudaErrorLaunchFailure = 719 };

struct Coordinate {
  unsigned x;
};
static Coordinate blockIdx, threadIdx;

namespace emulation {

constexpr int kStack = 1 << 17;

static cudaError_t error = cudaSuccess;
static bool descending = false;
static ucontext_t scheduler, contexts[DGF_THREADS];
static bool ended[DGF_THREADS];
static std::function<void()> body;
static std::vector<uint64_t> shared(1 << 13);  // 64 KiB
static std::vector<char> stacks(size_t(kStack) * DGF_THREADS);

inline unsigned char* shared_memory() {
  auto address = reinterpret_cast<uintptr_t>(shared.data());
  return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

inline void touch(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment) error = cudaErrorMisalignedAddress;
}

inline void thread_main() {
  body();
  ended[threadIdx.x] = true;
}

inline void run_block(unsigned block) {
  blockIdx.x = block;
  std::memset(shared.data(), 0xff, shared.size() * 8);
  for (int t = 0; t < DGF_THREADS; ++t) {
    ended[t] = false;
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = stacks.data() + size_t(kStack) * t;
    contexts[t].uc_stack.ss_size = kStack;
    contexts[t].uc_link = &scheduler;
    makecontext(&contexts[t], thread_main, 0);
  }
  for (int running = DGF_THREADS; running;) {
    running = 0;
    for (int i = 0; i < DGF_THREADS; ++i) {
      const int t = descending ? DGF_THREADS - 1 - i : i;
      threadIdx.x = unsigned(t);
      swapcontext(&scheduler, &contexts[t]);
      running += !ended[t];
    }
    if (running != 0 && running != DGF_THREADS) {
      error = cudaErrorLaunchFailure;
      return;
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
  const unsigned thread = threadIdx.x;
  swapcontext(&emulation::contexts[thread], &emulation::scheduler);
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::error;
  emulation::error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMisalignedAddress ? "misaligned address" : error == cudaErrorLaunchFailure ? "barrier missed" : "";
}

template <class... Parameters, class... Given>
void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes, cudaStream_t, const Given&... given) {
  if (shared_bytes > int64_t(emulation::shared.size()) * 8 - 16) emulation::error = cudaErrorLaunchFailure;
  emulation::body = [&] { kernel(given...); };
  for (int64_t b = 0; b < blocks && emulation::error == cudaSuccess; ++b) emulation::run_block(unsigned(b));
}

extern "C" __attribute__((visibility("default"))) void dgf_emulation_descending(int on) { emulation::descending = on != 0; }
