// What every native.cu shares: element types on the device, packets of 128 bits, launches, status codes.
//
// A kernel file uses of CUDA what this file names, so that tests/cuda_emulation.h can take its place: the same source is
// then compiled for the host and run a block at a time, with threads that meet at __syncthreads. Hence no warp shuffles.
#pragma once

#include "native.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DGF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define DGF_TOUCH(address, alignment)
#else
#include "cuda_emulation.h"
#endif

#ifndef DGF_THREADS
#define DGF_THREADS 256  // of a block; the emulation takes fewer, so that small tensors fill many blocks
#endif

#define DGF_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kThreads = DGF_THREADS;

// As kernels/library.py numbers them; a CUDA error e is kCudaError + e.
enum Status : int {
  kOk = 0, kNoMemory = 1, kBadType = 2, kOtherVersion = 3, kSmallWorkspace = 4, kTooLarge = 5, kCudaError = 1000
};

__device__ inline float decode(float v) { return v; }
__device__ inline float decode(int16_t v) { return float(v); }
__device__ inline float decode(uint8_t v) { return float(v); }
__device__ inline void encode(float v, float* out) { *out = v; }
#ifdef __CUDACC__
__device__ inline float decode(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ inline float decode(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline void encode(float v, Half* out) { out->bits = __half_as_ushort(__float2half_rn(v)); }
__device__ inline void encode(float v, BFloat16* out) { out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }

template <class... Parameters, class... Given>
void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes, cudaStream_t stream, const Given&... given) {
  kernel<<<dim3(unsigned(blocks)), dim3(kThreads), size_t(shared_bytes), stream>>>(given...);
}
#else
inline float decode(Half v) { return to_float(v); }
inline float decode(BFloat16 v) { return to_float(v); }
inline void encode(float v, Half* out) { from_float(v, out); }
inline void encode(float v, BFloat16* out) { from_float(v, out); }
#endif

template <class T>
constexpr bool kIsFloat = true;
template <>
constexpr bool kIsFloat<int16_t> = false;
template <>
constexpr bool kIsFloat<uint8_t> = false;

// COUNT neighbours, moved in the fewest loads or stores: 128 bits each, where there are as many.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT < 16 ? sizeof(T) * COUNT : 16) Packet {
  T values[COUNT];
};

template <int COUNT, class T>
__device__ inline Packet<T, COUNT> load_packet(const T* from) {
  DGF_TOUCH(from, alignof(Packet<T, COUNT>));
  return *reinterpret_cast<const Packet<T, COUNT>*>(from);
}

template <int COUNT, class T>
__device__ inline void store_packet(T* to, const Packet<T, COUNT>& packet) {
  DGF_TOUCH(to, alignof(Packet<T, COUNT>));
  *reinterpret_cast<Packet<T, COUNT>*>(to) = packet;
}

// Calls `visit` with a value of the element type: what depends on the type is compiled for each.
template <class Visit>
__device__ inline void with_type(int32_t type, Visit visit) {
  switch (type) {
    case kFloat32: visit(float()); break;
    case kFloat16: visit(Half()); break;
    case kBFloat16: visit(BFloat16()); break;
    case kInt16: visit(int16_t()); break;
    case kUInt8: visit(uint8_t()); break;
  }
}

template <class Visit>
__device__ inline void with_float_type(int32_t type, Visit visit) {
  switch (type) {
    case kFloat32: visit(float()); break;
    case kFloat16: visit(Half()); break;
    case kBFloat16: visit(BFloat16()); break;
  }
}

// One element of any type, where speed does not matter enough for code of its own.
__device__ inline float load_any(int32_t type, const void* data, int64_t offset) {
  float result = 0.0f;
  with_type(type, [&](auto kind) { result = decode(static_cast<const decltype(kind)*>(data)[offset]); });
  return result;
}

inline int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type == kUInt8 ? 1 : 2; }
inline bool is_float_type(int32_t type) { return type == kFloat32 || type == kFloat16 || type == kBFloat16; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0; }

}  // namespace
