// Element-wise passes around quantized GEMMs, each in one read and one write; see passes.py.
//
// Every function computes what the torch expression named above it computes, element by element, in
// float32 and with the same roundings, whatever the number of threads. No torch headers: pointers,
// sizes and plain structs only. `run` is the number of consecutive elements that share a scale; it
// is a multiple of 8, so that a byte of a mask belongs to one scale. Bit i of byte j of a mask is element 8 j + i.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 1024;  // elements per inner loop: small enough for L1, a multiple of 8

struct bf16 {
  uint16_t bits;
};

inline float load(float v) { return v; }

inline float load(bf16 v) {
  const uint32_t word = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline void store(float* to, float v) { *to = v; }

inline void store(bf16* to, float v) {  // nearest, ties to even, as torch
  uint32_t word;
  std::memcpy(&word, &v, 4);
  const uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(v != v ? 0x7FC0u : rounded);
}

template <typename T>
inline float through(float v) {  // rounded to T and back
  T stored;
  store(&stored, v);
  return load(stored);
}

inline float load(int32_t v) { return static_cast<float>(v); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The eight bytes of a word are 0 or 1 -> the bits of a byte.
inline uint8_t pack_word(const uint8_t* bools) {
  uint64_t word;
  std::memcpy(&word, bools, 8);
  return static_cast<uint8_t>((word * 0x0102040810204080ull) >> 56);
}

// The bits of a byte -> eight bytes, zero or not.
inline void unpack_byte(uint8_t byte, uint8_t* bytes) {
  const uint64_t word = (byte * 0x0101010101010101ull) & 0x8040201008040201ull;
  std::memcpy(bytes, &word, 8);
}

// Nearest E4M3 number, ties to even, of |v| <= 448, as the code's bits; NaN is not kept.
inline uint8_t to_e4m3(float v) {
  uint32_t word;
  std::memcpy(&word, &v, 4);
  const uint32_t sign = (word >> 24) & 0x80u;
  const uint32_t magnitude = word & 0x7FFFFFFFu;
  float size;
  std::memcpy(&size, &magnitude, 4);
  // Normal numbers: drop 20 of 23 mantissa bits; the exponent bias goes from 127 to 7.
  const uint32_t normal = ((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2**-6 steps are 2**-9: adding 2**14 leaves the rounded multiple in the low mantissa bits.
  const float shifted = size + 16384.0f;
  uint32_t subnormal;
  std::memcpy(&subnormal, &shifted, 4);
  const uint32_t is_small = -static_cast<uint32_t>(size < 0.015625f);  // all ones or zero
  return static_cast<uint8_t>((is_small & subnormal & 0xFu) | (~is_small & normal) | sign);
}

inline float from_e4m3(uint8_t code) {  // but for NaN, which codes do not hold
  const uint32_t word = (static_cast<uint32_t>(code & 0x80u) << 24) | (static_cast<uint32_t>(code & 0x7Fu) << 20);
  float value;
  std::memcpy(&value, &word, 4);
  return value * 0x1p120f;
}

struct CodeRange {
  float low, high;    // clamping
  float first, last;  // gradients pass between these
  int32_t is_float;   // E4M3 instead of integers
};

// Calls body(begin, end, scale index) on pieces of at most kBlock elements with one scale each.
template <typename Body>
void for_runs(int64_t n, int64_t run, int threads, Body body) {
  if (n == 0) return;
  const int64_t size = smaller(run, kBlock);
  const int64_t per_run = (run + size - 1) / size;
  const int64_t pieces = (n / run) * per_run;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t index = piece / per_run;
    const int64_t begin = index * run + (piece % per_run) * size;
    body(begin, smaller(begin + size, (index + 1) * run), index);
  }
}

template <typename T>
void ratios(const T* x, float step, int64_t count, float* ratio) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) ratio[k] = load(x[k]) / step;
}

void mask_of(const float* ratio, int64_t count, const CodeRange& range, uint8_t* mask) {
  uint8_t inside[kBlock];
  const float first = range.first, last = range.last;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) inside[k] = (ratio[k] >= first) & (ratio[k] <= last);
  for (int64_t k = 0; k < count; k += 8) mask[k / 8] = pack_word(inside + k);
}

inline float clamp(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }

// Codes of at most kBlock ratios and, if asked for, their mask; whether any ratio is NaN.
bool codes_of(const float* ratio, int64_t count, const CodeRange& range, float shift, int8_t* codes, uint8_t* mask) {
  if (mask) mask_of(ratio, count, range, mask);
  int32_t any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t k = 0; k < count; ++k) any |= ratio[k] != ratio[k];
  const float low = range.low - shift, high = range.high - shift;
  if (range.is_float) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k)
      codes[k] = static_cast<int8_t>(to_e4m3(clamp(ratio[k], low, high)));
  } else {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const float code = clamp(std::rint(ratio[k]), low, high) + shift;
      codes[k] = static_cast<int8_t>(static_cast<int32_t>(code));
    }
  }
  return any != 0;
}

template <typename T>
void encode(const T* x, const float* scale, const int32_t* zero, int64_t n, int64_t run, const CodeRange& range,
            int8_t* codes, uint8_t* mask, int32_t* nan, int threads) {
  int32_t found = 0;
  for_runs(n, run, threads, [&](int64_t begin, int64_t end, int64_t index) {
    float ratio[kBlock];
    const int64_t count = end - begin;
    ratios(x + begin, scale[index], count, ratio);
    const float shift = zero ? static_cast<float>(zero[index]) : 0.0f;
    if (codes_of(ratio, count, range, shift, codes + begin, mask ? mask + begin / 8 : nullptr))
      __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
  });
  *nan = found;
}

template <typename T>
void fake_quantize(const T* x, const float* scale, int64_t n, int64_t run, const CodeRange& range, T* out,
                   uint8_t* mask, int threads) {
  for_runs(n, run, threads, [&](int64_t begin, int64_t end, int64_t index) {
    float ratio[kBlock];
    const int64_t count = end - begin;
    ratios(x + begin, scale[index], count, ratio);
    if (mask) mask_of(ratio, count, range, mask + begin / 8);
    const float low = range.low, high = range.high, step = scale[index];
    // -0.0 + 0.0 is 0.0: integer codes have no negative zero.
#pragma omp simd
    for (int64_t k = 0; k < count; ++k)
      store(out + begin + k, clamp(std::rint(ratio[k]), low, high) * step + 0.0f);
  });
}

template <typename T>
void decode(const int8_t* codes, int is_float, const float* scale, const int32_t* zero, int64_t n, int64_t run,
            T* out, int threads) {
  for_runs(n, run, threads, [&](int64_t begin, int64_t end, int64_t index) {
    const float step = scale ? scale[index] : 1.0f;
    const int32_t shift = zero ? zero[index] : 0;
    if (is_float) {
#pragma omp simd
      for (int64_t k = begin; k < end; ++k)
        store(out + k, from_e4m3(static_cast<uint8_t>(codes[k])) * step);
    } else {
#pragma omp simd
      for (int64_t k = begin; k < end; ++k) store(out + k, static_cast<float>(codes[k] - shift) * step);
    }
  });
}

template <typename P, typename T>
void scale_product(const P* product, int64_t rows, int64_t cols, const float* col_scale,
                   int64_t col_scales, const float* row_scale, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const P* from = product + row * cols;
    T* to = out + row * cols;
    const float factor = row_scale ? row_scale[row] : 1.0f;
    if (col_scales == 1) {
#pragma omp simd
      for (int64_t k = 0; k < cols; ++k) store(to + k, load(from[k]) * factor * col_scale[0]);
    } else {
#pragma omp simd
      for (int64_t k = 0; k < cols; ++k) store(to + k, load(from[k]) * factor * col_scale[k]);
    }
  }
}

// Calls body(begin, count, keep) with a byte per element that says whether its bit is set.
template <typename Body>
void for_masked(int64_t n, const uint8_t* mask, int threads, Body body) {
  const int64_t pieces = (n + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = piece * kBlock, count = smaller(kBlock, n - begin);
    uint8_t keep[kBlock];
    if (mask) {
      for (int64_t k = 0; k < count; k += 8) unpack_byte(mask[(begin + k) / 8], keep + k);
    } else {
      std::memset(keep, 1, sizeof keep);
    }
    body(begin, count, keep);
  }
}

template <typename T>
void apply_mask(T* x, int64_t n, const uint8_t* mask, const float* scale, int threads) {
  const float factor = scale ? *scale : 1.0f;
  for_masked(n, mask, threads, [&](int64_t begin, int64_t count, const uint8_t* keep) {
    T* to = x + begin;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const float value = load(to[k]) * factor;
      store(to + k, keep[k] ? value : 0.0f);
    }
  });
}

template <typename T>
void accumulate(const T* x, int64_t n, const uint8_t* mask, const float* scale, float* total, int threads) {
  const float factor = scale ? *scale : 1.0f;
  for_masked(n, mask, threads, [&](int64_t begin, int64_t count, const uint8_t* keep) {
    float* to = total + begin;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const float value = load(x[begin + k]) * factor;
      to[k] += keep[k] ? value : 0.0f;
    }
  });
}

// A uniform 32-bit number from where an element is: `reference._random_words`.
inline uint32_t random_word(uint32_t row_key, int32_t column, uint32_t seed) {
  uint32_t word = (row_key + static_cast<uint32_t>(column)) ^ seed;
  word ^= word >> 16;
  word *= 0x7FEB352Du;
  word ^= word >> 15;
  word *= 0x846CA68Bu;
  return word ^ (word >> 16);
}

inline float uniform(uint32_t word) { return static_cast<float>(word >> 16) * 0x1p-16f; }

inline int8_t int8_up_or_down(float ratio, uint32_t word) {
  const float code = clamp(std::floor(ratio + uniform(word)), -127.0f, 127.0f);
  return static_cast<int8_t>(static_cast<int32_t>(code));
}

inline int8_t e4m3_up_or_down(float ratio, uint32_t word) {
  uint32_t bits;
  std::memcpy(&bits, &ratio, 4);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const float magnitude = std::fabs(ratio), size = magnitude > 448.0f ? 448.0f : magnitude;
  std::memcpy(&bits, &size, 4);
  const uint32_t normal = ((bits + (word >> 12)) >> 20) - (120u << 3);
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(size * 512.0f + uniform(word)));
  const uint32_t is_small = -static_cast<uint32_t>(size < 0.015625f);  // all ones or zero
  return static_cast<int8_t>((is_small & subnormal) | (~is_small & normal) | sign);
}

inline float stochastic_scale(float amax, bool is_nan, float largest) {
  const float scale = amax / largest;
  return is_nan ? NAN : (scale < 0x1p-126f ? 0x1p-126f : scale);
}

template <typename T>
void stochastic_rows(const T* x, const float* factor, const int32_t* columns, int64_t rows, int64_t cols,
                     uint32_t seed, int is_float, float largest, int8_t* codes, float* scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * cols;
    int8_t* to = codes + row * cols;
    float amax = 0.0f;
    int32_t nan = 0;
#pragma omp simd reduction(max : amax) reduction(| : nan)
    for (int64_t k = 0; k < cols; ++k) {
      const float v = load(from[k]) * factor[k];
      const float size = std::fabs(v);
      nan |= v != v;
      amax = size > amax ? size : amax;
    }
    const float step = stochastic_scale(amax, nan != 0, largest);
    const uint32_t key = static_cast<uint32_t>(row) * 0x9E3779B1u;
    scale[row] = step;
    if (is_float) {
#pragma omp simd
      for (int64_t k = 0; k < cols; ++k) {
        const float v = load(from[k]) * factor[k];
        to[k] = e4m3_up_or_down(v / step, random_word(key, columns[k], seed));
      }
    } else {
#pragma omp simd
      for (int64_t k = 0; k < cols; ++k) {
        const float v = load(from[k]) * factor[k];
        to[k] = int8_up_or_down(v / step, random_word(key, columns[k], seed));
      }
    }
  }
}

// A thread has whole columns; codes are transposed in tiles that fit the first cache.
template <typename T>
void stochastic_columns(const T* x, const float* factor, const int32_t* columns, int64_t rows, int64_t cols,
                        uint32_t seed, int is_float, float largest, int8_t* codes, float* scale, int threads) {
  constexpr int64_t kCols = 64, kRows = 64;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t first = 0; first < cols; first += kCols) {
    const int64_t width = smaller(kCols, cols - first);
    float amax[kCols] = {0.0f}, step[kCols];
    int32_t nan[kCols] = {0};
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = x + row * cols + first;
      const float f = factor ? factor[row] : 1.0f;
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) {
        const float v = load(from[k]) * f, size = std::fabs(v);
        nan[k] |= v != v;
        amax[k] = size > amax[k] ? size : amax[k];
      }
    }
    for (int64_t k = 0; k < width; ++k) step[k] = stochastic_scale(amax[k], nan[k] != 0, largest);
    std::memcpy(scale + first, step, width * sizeof(float));
    for (int64_t top = 0; top < rows; top += kRows) {
      const int64_t height = smaller(kRows, rows - top);
      int8_t tile[kRows][kCols];
      for (int64_t r = 0; r < height; ++r) {
        const T* from = x + (top + r) * cols + first;
        const float f = factor ? factor[top + r] : 1.0f;
        const uint32_t key = static_cast<uint32_t>(top + r) * 0x9E3779B1u;
        int8_t* to = tile[r];
        if (is_float) {
#pragma omp simd
          for (int64_t k = 0; k < width; ++k)
            to[k] = e4m3_up_or_down(load(from[k]) * f / step[k], random_word(key, columns[first + k], seed));
        } else {
#pragma omp simd
          for (int64_t k = 0; k < width; ++k)
            to[k] = int8_up_or_down(load(from[k]) * f / step[k], random_word(key, columns[first + k], seed));
        }
      }
      for (int64_t k = 0; k < width; ++k) {
        int8_t* to = codes + (first + k) * rows + top;
        for (int64_t r = 0; r < height; ++r) to[r] = tile[r][k];
      }
    }
  }
}

// exp(v), relative error below 2**-22 (Cody and Waite's reduction, polynomial of degree 6).
inline float exponential(float v) {
  const float x = clamp(v, -87.0f, 88.0f);
  const float k = std::rint(x * 1.44269504f);
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float v) { return 1.0f / (1.0f + exponential(-v)); }

template <typename T>
inline float silu(float v) { return through<T>(v / (1.0f + exponential(-v))); }

template <typename T>
void swiglu(const T* x, int64_t rows, int64_t cols, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = x + row * 2 * cols, *up = gate + cols;
#pragma omp simd
    for (int64_t k = 0; k < cols; ++k)
      store(out + row * cols + k, silu<T>(load(gate[k])) * load(up[k]));
  }
}

template <typename T>
void swiglu_encode(const T* x, const float* scale, int64_t rows, int64_t cols, const CodeRange& range, int8_t* codes,
                   uint8_t* mask, int32_t* nan, int threads) {
  const float step = *scale;
  int32_t found = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t first = 0; first < cols; first += kBlock) {
      const int64_t count = smaller(kBlock, cols - first), begin = row * cols + first;
      const T *gate = x + row * 2 * cols + first, *up = gate + cols;
      float ratio[kBlock];
#pragma omp simd
      for (int64_t k = 0; k < count; ++k)
        ratio[k] = through<T>(silu<T>(load(gate[k])) * load(up[k])) / step;
      if (codes_of(ratio, count, range, 0.0f, codes + begin, mask ? mask + begin / 8 : nullptr))
        __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
    }
  }
  *nan = found;
}

template <typename T>
void swiglu_backward(const T* grad, const T* x, const uint8_t* mask, int64_t rows, int64_t cols, T* out,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t first = 0; first < cols; first += kBlock) {
      const int64_t count = smaller(kBlock, cols - first), begin = row * cols + first;
      const T *gate = x + row * 2 * cols + first, *up = gate + cols, *dy = grad + begin;
      T *dgate = out + row * 2 * cols + first, *dup = dgate + cols;
      uint8_t keep[kBlock];
      std::memset(keep, 1, sizeof keep);
      if (mask)
        for (int64_t k = 0; k < count; k += 8) unpack_byte(mask[(begin + k) / 8], keep + k);
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        const float g = load(gate[k]), s = sigmoid(g), upstream = load(dy[k]);
        const float d = keep[k] ? upstream : 0.0f;
        store(dup + k, d * silu<T>(g));
        store(dgate + k, through<T>(d * load(up[k])) * s * (1.0f + g * (1.0f - s)));
      }
    }
  }
}

template <typename T>
void rms_norm(const T* x, const T* weight, int64_t rows, int64_t cols, float eps, T* out, float* rstd,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * cols;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < cols; ++k) sum += load(from[k]) * load(from[k]);
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(cols) + eps);
    rstd[row] = factor;
#pragma omp simd
    for (int64_t k = 0; k < cols; ++k) store(out + row * cols + k, load(from[k]) * factor * load(weight[k]));
  }
}

template <typename T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, const float* rstd, int64_t rows, int64_t cols,
                       T* dx, float* dweight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T *dy = grad + row * cols, *from = x + row * cols;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < cols; ++k) sum += load(dy[k]) * load(weight[k]) * load(from[k]);
    const float factor = rstd[row];
    const float shift = factor * factor * (sum / static_cast<float>(cols));
#pragma omp simd
    for (int64_t k = 0; k < cols; ++k)
      store(dx + row * cols + k, factor * (load(dy[k]) * load(weight[k]) - load(from[k]) * shift));
  }
  if (!dweight) return;
  constexpr int64_t kCols = 256;  // a thread adds up whole columns, in the order of rows
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t first = 0; first < cols; first += kCols) {
    float sum[kCols] = {0.0f};
    const int64_t count = smaller(kCols, cols - first);
    for (int64_t row = 0; row < rows; ++row) {
      const T *dy = grad + row * cols + first, *from = x + row * cols + first;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) sum[k] += load(dy[k]) * (load(from[k]) * rstd[row]);
    }
    std::memcpy(dweight + first, sum, count * sizeof(float));
  }
}

}  // namespace

#define FOR_BOTH(NAME, CALL)        \
  extern "C" void mqat_##NAME##_f32 CALL(float) extern "C" void mqat_##NAME##_bf16 CALL(bf16)

#define ENCODE(T)                                                                                            \
  (const T* x, const float* scale, const int32_t* zero, int64_t n, int64_t run, const CodeRange* range,          \
   int8_t* codes, uint8_t* mask, int32_t* nan, int threads) {                                               \
    encode(x, scale, zero, n, run, *range, codes, mask, nan, threads);                                       \
  }
FOR_BOTH(encode, ENCODE)

#define FAKE_QUANTIZE(T)                                                                                     \
  (const T* x, const float* scale, int64_t n, int64_t run, const CodeRange* range, T* out, uint8_t* mask,         \
   int threads) { fake_quantize(x, scale, n, run, *range, out, mask, threads); }
FOR_BOTH(fake_quantize, FAKE_QUANTIZE)

#define DECODE(T)                                                                                            \
  (const int8_t* codes, int is_float, const float* scale, const int32_t* zero, int64_t n, int64_t run, T* out, \
   int threads) { decode(codes, is_float, scale, zero, n, run, out, threads); }
FOR_BOTH(decode, DECODE)

#define SCALE(T, P)                                                                                          \
  (const P* product, int64_t rows, int64_t cols, const float* col_scale, int64_t col_scales, \
   const float* row_scale, T* out, int threads) {                                                            \
    scale_product(product, rows, cols, col_scale, col_scales, row_scale, out, threads);              \
  }
#define SCALE_INTS(T) SCALE(T, int32_t)
FOR_BOTH(scale_ints, SCALE_INTS)
#define SCALE_FLOATS(T) SCALE(T, float)
FOR_BOTH(scale_floats, SCALE_FLOATS)
#define SCALE_HALVES(T) SCALE(T, bf16)
FOR_BOTH(scale_halves, SCALE_HALVES)

#define APPLY_MASK(T)                                                                                        \
  (T * x, int64_t n, const uint8_t* mask, const float* scale, int threads) {                                \
    apply_mask(x, n, mask, scale, threads);                                                                  \
  }
FOR_BOTH(apply_mask, APPLY_MASK)

#define ACCUMULATE(T)                                                                                        \
  (const T* x, int64_t n, const uint8_t* mask, const float* scale, float* total, int threads) {             \
    accumulate(x, n, mask, scale, total, threads);                                                           \
  }
FOR_BOTH(accumulate, ACCUMULATE)

#define STOCHASTIC(NAME, T)                                                                                  \
  (const T* x, const float* factor, const int32_t* columns, int64_t rows, int64_t cols, uint32_t seed,      \
   int is_float, float largest, int8_t* codes, float* scale, int threads) {                                 \
    NAME(x, factor, columns, rows, cols, seed, is_float, largest, codes, scale, threads);                    \
  }
#define STOCHASTIC_ROWS(T) STOCHASTIC(stochastic_rows, T)
FOR_BOTH(stochastic_rows, STOCHASTIC_ROWS)
#define STOCHASTIC_COLUMNS(T) STOCHASTIC(stochastic_columns, T)
FOR_BOTH(stochastic_columns, STOCHASTIC_COLUMNS)

#define SWIGLU(T) \
  (const T* x, int64_t rows, int64_t cols, T* out, int threads) { swiglu(x, rows, cols, out, threads); }
FOR_BOTH(swiglu, SWIGLU)

#define SWIGLU_ENCODE(T)                                                                                     \
  (const T* x, const float* scale, int64_t rows, int64_t cols, const CodeRange* range, int8_t* codes,       \
   uint8_t* mask, int32_t* nan, int threads) {                                                              \
    swiglu_encode(x, scale, rows, cols, *range, codes, mask, nan, threads);                                  \
  }
FOR_BOTH(swiglu_encode, SWIGLU_ENCODE)

#define SWIGLU_BACKWARD(T)                                                                                   \
  (const T* grad, const T* x, const uint8_t* mask, int64_t rows, int64_t cols, T* out, int threads) {       \
    swiglu_backward(grad, x, mask, rows, cols, out, threads);                                                \
  }
FOR_BOTH(swiglu_backward, SWIGLU_BACKWARD)

#define RMS_NORM(T)                                                                                          \
  (const T* x, const T* weight, int64_t rows, int64_t cols, float eps, T* out, float* rstd, int threads) {  \
    rms_norm(x, weight, rows, cols, eps, out, rstd, threads);                                                \
  }
FOR_BOTH(rms_norm, RMS_NORM)

#define RMS_NORM_BACKWARD(T)                                                                                 \
  (const T* grad, const T* x, const T* weight, const float* rstd, int64_t rows, int64_t cols, T* dx,        \
   float* dweight, int threads) {                                                                            \
    rms_norm_backward(grad, x, weight, rstd, rows, cols, dx, dweight, threads);                              \
  }
FOR_BOTH(rms_norm_backward, RMS_NORM_BACKWARD)
