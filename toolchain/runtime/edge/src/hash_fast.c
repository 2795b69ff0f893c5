/* SHA-256 by the processor's own instructions, several times as fast: what starting a model waits for is its digest. */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* The working variables are kept as ABEF and CDGH, the order that sha256rnds2 takes (Intel SDM). */
#define ROUNDS(number, w)                                                                                      \
  k = _mm_add_epi32(w, _mm_loadu_si128((const __m128i *)(const void *)(tcr_sha256_constants + 4 * (number)))); \
  cdgh = _mm_sha256rnds2_epu32(cdgh, abef, k);                                                                 \
  abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(k, 0x0e));
#define NEXT(number, w, x, y, z)                                           \
  w = _mm_add_epi32(_mm_sha256msg1_epu32(w, x), _mm_alignr_epi8(z, y, 4)); \
  w = _mm_sha256msg2_epu32(w, z);                                          \
  ROUNDS(number, w)
#define FOUR(number)           \
  NEXT(number, a, b, c, d)     \
  NEXT(number + 1, b, c, d, a) \
  NEXT(number + 2, c, d, a, b) \
  NEXT(number + 3, d, a, b, c)

__attribute__((target("sha,sse4.1,ssse3"))) static void fast_blocks(uint32_t *state, const uint8_t *data,
                                                                    size_t count) {
  const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i t = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(const void *)state), 0xb1);
  __m128i cdgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(const void *)(state + 4)), 0x1b);
  __m128i abef = _mm_alignr_epi8(t, cdgh, 8);
  cdgh = _mm_blend_epi16(cdgh, t, 0xf0);
  for (; count; count--, data += 64) {
    const __m128i *from = (const __m128i *)(const void *)data;
    __m128i old_abef = abef, old_cdgh = cdgh, k;
    __m128i a = _mm_shuffle_epi8(_mm_loadu_si128(from), order);
    __m128i b = _mm_shuffle_epi8(_mm_loadu_si128(from + 1), order);
    __m128i c = _mm_shuffle_epi8(_mm_loadu_si128(from + 2), order);
    __m128i d = _mm_shuffle_epi8(_mm_loadu_si128(from + 3), order);
    ROUNDS(0, a) ROUNDS(1, b) ROUNDS(2, c) ROUNDS(3, d) FOUR(4) FOUR(8) FOUR(12) abef = _mm_add_epi32(abef, old_abef);
    cdgh = _mm_add_epi32(cdgh, old_cdgh);
  }
  t = _mm_shuffle_epi32(abef, 0x1b);
  cdgh = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128((__m128i *)(void *)state, _mm_blend_epi16(t, cdgh, 0xf0));
  _mm_storeu_si128((__m128i *)(void *)(state + 4), _mm_alignr_epi8(cdgh, t, 8));
}

void (*tcr_sha256_fast(void))(uint32_t *, const uint8_t *, size_t) {
  return tcr_host_has("sha_ni") && tcr_host_has("sse4_1") && tcr_host_has("ssse3") ? fast_blocks : NULL;
}

#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#ifdef __clang__
#define SHA2 "sha2"
#else
#define SHA2 "+crypto"
#endif
#include <arm_neon.h>

__attribute__((target(SHA2))) static void fast_blocks(uint32_t *state, const uint8_t *data, size_t count) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; count; count--, data += 64) {
    uint32x4_t old_abcd = abcd, old_efgh = efgh, w[4];
    for (int i = 0; i < 4; i++) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
    for (int i = 0; i < 16; i++) {
      if (i >= 4) w[i & 3] = vsha256su1q_u32(vsha256su0q_u32(w[i & 3], w[(i + 1) & 3]), w[(i + 2) & 3], w[(i + 3) & 3]);
      uint32x4_t k = vaddq_u32(w[i & 3], vld1q_u32(tcr_sha256_constants + 4 * i)), before = abcd;
      abcd = vsha256hq_u32(abcd, efgh, k);
      efgh = vsha256h2q_u32(efgh, before, k);
    }
    abcd = vaddq_u32(abcd, old_abcd);
    efgh = vaddq_u32(efgh, old_efgh);
  }
  vst1q_u32(state, abcd);
  vst1q_u32(state + 4, efgh);
}

void (*tcr_sha256_fast(void))(uint32_t *, const uint8_t *, size_t) { return tcr_host_has("sha2") ? fast_blocks : NULL; }

#else
void (*tcr_sha256_fast(void))(uint32_t *, const uint8_t *, size_t) { return NULL; }
#endif
