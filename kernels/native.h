// What every native kernel shares: element types, the export macro that picks the code for this CPU, scratch memory.
//
// Each native.cpp is compiled once per instruction set (DGF_LEVEL = baseline, avx2, avx512) into the same library, and
// the exported function picks one when called. Code of different levels must never be merged by the linker, so
// everything here and in the kernels lives in an anonymous namespace and no standard library template is instantiated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define DGF_JOIN2(a, b, c) a##b##c
#define DGF_JOIN(a, b, c) DGF_JOIN2(a, b, c)

// DGF_ENTRY(name, Arguments) { body } defines dgf_name(const Arguments*), dispatched by instruction set.
#if defined(DGF_LEVELS) && defined(DGF_BASELINE)
#define DGF_ENTRY(name, Arguments)                                                                                     \
  extern "C" int dgf_avx2_##name(const Arguments*);                                                                    \
  extern "C" int dgf_avx512_##name(const Arguments*);                                                                  \
  extern "C" int dgf_baseline_##name(const Arguments*);                                                                \
  extern "C" __attribute__((visibility("default"))) int dgf_##name(const Arguments* a) {                               \
    static const int level = cpu_level();                                                                              \
    return level == 2 ? dgf_avx512_##name(a) : level == 1 ? dgf_avx2_##name(a) : dgf_baseline_##name(a);               \
  }                                                                                                                    \
  extern "C" int dgf_baseline_##name([[maybe_unused]] const Arguments* arguments)
#elif defined(DGF_LEVELS)
#define DGF_ENTRY(name, Arguments)                                                                                     \
  extern "C" int DGF_JOIN(DGF_LEVEL, _, name)(const Arguments*);                                                       \
  extern "C" int DGF_JOIN(DGF_LEVEL, _, name)([[maybe_unused]] const Arguments* arguments)
#else  // one level only
#define DGF_ENTRY(name, Arguments)                                                                                     \
  extern "C" __attribute__((visibility("default"))) int dgf_##name([[maybe_unused]] const Arguments* arguments)
#endif

namespace {

#if defined(DGF_LEVELS) && defined(DGF_BASELINE)
// 0 baseline, 1 AVX2 + FMA + F16C, 2 AVX-512 (F, BW, DQ, VL); DROPGEN_FAST_CPU_LEVEL lowers it, for tests.
int cpu_level() {
  __builtin_cpu_init();
  int level = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c"))
    level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = 2;
  if (const char* wanted = std::getenv("DROPGEN_FAST_CPU_LEVEL")) {
    const int limit = std::atoi(wanted);
    if (limit >= 0 && limit < level) level = limit;
  }
  return level;
}
#endif

// Element types, numbered as kernels/library.py numbers them.
enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt16 = 3, kUInt8 = 4 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(int16_t v) { return v; }
inline float to_float(uint8_t v) { return v; }
inline float to_float(BFloat16 v) { return from_bits(uint32_t(v.bits) << 16); }
#ifdef __FLT16_MANT_DIG__
inline float to_float(Half v) {
  _Float16 h;
  std::memcpy(&h, &v.bits, 2);
  return float(h);
}
inline Half to_half(float v) {
  const _Float16 h = _Float16(v);
  Half result;
  std::memcpy(&result.bits, &h, 2);
  return result;
}
#else
// For compilers without a half type. Scaling by a power of two moves the exponent, exactly, subnormals included.
inline float to_float(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000)));  // · 2^112
}
inline Half to_half(float v) {
  const uint32_t bits = to_bits(v), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (rest < 0x38800000)  // subnormal: adding 0.5 leaves the rounded units of 2^-24 in the low bits
    return {uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13))};
}
#endif

inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, Half* out) { *out = to_half(v); }
inline void from_float(float v, BFloat16* out) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = to_bits(v);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = uint16_t(v != v ? (bits >> 16 | 0x40) : rounded);
}

// A row of n elements, `stride` elements apart, to float and back. Chosen once per call, used once per row.
using LoadRow = void (*)(const void* data, int64_t offset, int64_t stride, int64_t n, float* out);
using StoreRow = void (*)(const float* row, void* data, int64_t offset, int64_t stride, int64_t n);

template <class T>
void load_row(const void* data, int64_t offset, int64_t stride, int64_t n, float* __restrict out) {
  const T* __restrict p = static_cast<const T*>(data) + offset;
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i * stride]);
}

template <class T>
void store_row(const float* __restrict row, void* data, int64_t offset, int64_t stride, int64_t n) {
  T* __restrict p = static_cast<T*>(data) + offset;
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) from_float(row[i], p + i);
  else
    for (int64_t i = 0; i < n; ++i) from_float(row[i], p + i * stride);
}

inline LoadRow load_for(int32_t type) {
  switch (type) {
    case kFloat32: return load_row<float>;
    case kFloat16: return load_row<Half>;
    case kBFloat16: return load_row<BFloat16>;
    case kInt16: return load_row<int16_t>;
    case kUInt8: return load_row<uint8_t>;
    default: return nullptr;
  }
}

// What a floating type has: of three of a kind, or null for a type that is none.
template <class Function>
Function of_float(int32_t type, Function float32, Function float16, Function bfloat16) {
  return type == kFloat32 ? float32 : type == kFloat16 ? float16 : type == kBFloat16 ? bfloat16 : nullptr;
}

inline StoreRow store_for(int32_t type) { return of_float<StoreRow>(type, store_row<float>, store_row<Half>, store_row<BFloat16>); }

constexpr int64_t kLine = 64;  // bytes of a cache line, and of the widest vector
constexpr int64_t kLineFloats = kLine / sizeof(float);
constexpr int64_t kUncached = 8 << 20;  // bytes from which a tensor is no longer looked for in a cache
inline int64_t whole_lines(int64_t floats) { return (floats + kLineFloats - 1) / kLineFloats * kLineFloats; }

// Scratch memory of one thread, freed with its scope, on a cache line. `data` is null when there is no memory.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n) {
    const size_t bytes = (sizeof(T) * size_t(n > 0 ? n : 1) + kLine - 1) / kLine * kLine;
    data = static_cast<T*>(aligned_alloc(kLine, bytes));
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Zeros in part of a tensor of `whole` bytes. In a large one past the cache: a line that is written whole need not be read
// first, and what the cache holds stays there.
inline void clear(void* data, int64_t bytes, [[maybe_unused]] int64_t whole) {
  char *at = static_cast<char*>(data), *end = at + bytes;
#if defined(__SSE2__)
  char* aligned = at + (-reinterpret_cast<uintptr_t>(at) & (kLine - 1));
  if (whole >= kUncached && end - aligned >= kLine) {
    std::memset(at, 0, size_t(aligned - at));
    for (at = aligned; end - at >= kLine; at += kLine)
      for (int part = 0; part < kLine; part += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(at + part), _mm_setzero_si128());
    _mm_sfence();
  }
#endif
  std::memset(at, 0, size_t(end - at));
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// As many floats as a vector of this level holds, for loops that keep more in registers than compilers would by themselves.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
constexpr int64_t kVectorFloats = kVectorBytes / sizeof(float);
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

inline Floats load_floats(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(Floats));
  return v;
}
inline void store_floats(Floats v, float* p) { std::memcpy(p, &v, sizeof(Floats)); }

// 2^t for t ≤ 0, within 3 · 2^-24 of it, relative; 1 at 0; 2^-126, the smallest normal number, from -126 on. The polynomial is a
// minimax fit on half a unit to either side of 0 with the constant 1. What is not a number is one afterwards only if its last nine
// bits are 0, as those are that arithmetic makes.
inline Floats exp2_of_negative(Floats t) {
  const Floats lowest = Floats{} - 126.0f, y = lowest > t ? lowest : t;
  const Floats shifted = y + 12582912.0f;  // 1.5 · 2^23: leaves the nearest whole number n in the low bits
  const Floats f = y - (shifted - 12582912.0f);
  Floats p = f * 0.00132647273f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return Floats(Ints(p) + (Ints(shifted) << 23));  // n added to the exponent
}

}  // namespace
