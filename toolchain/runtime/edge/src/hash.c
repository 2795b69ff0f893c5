/* SHA-256 (FIPS 180-4). */
#include <string.h>

#include "internal.h"

const uint32_t tcr_sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotated(uint32_t value, int by) { return value >> by | value << (32 - by); }

#define ROUND(a, b, c, d, e, f, g, h, i)                                                                  \
  s[h] += (rotated(s[e], 6) ^ rotated(s[e], 11) ^ rotated(s[e], 25)) + ((s[e] & s[f]) ^ (~s[e] & s[g])) + \
          tcr_sha256_constants[i] + w[i];                                                                 \
  s[d] += s[h];                                                                                           \
  s[h] += (rotated(s[a], 2) ^ rotated(s[a], 13) ^ rotated(s[a], 22)) + ((s[a] & s[b]) ^ (s[a] & s[c]) ^ (s[b] & s[c]));

static void portable_blocks(uint32_t *state, const uint8_t *data, size_t count) {
  for (; count; count--, data += 64) {
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
      w[i] = (uint32_t)data[4 * i] << 24 | (uint32_t)data[4 * i + 1] << 16 | (uint32_t)data[4 * i + 2] << 8 |
             data[4 * i + 3];
    for (int i = 16; i < 64; i++) {
      uint32_t a = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
      uint32_t b = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i += 8) { /* variables change their places instead of being moved */
      ROUND(0, 1, 2, 3, 4, 5, 6, 7, i)
      ROUND(7, 0, 1, 2, 3, 4, 5, 6, i + 1)
      ROUND(6, 7, 0, 1, 2, 3, 4, 5, i + 2)
      ROUND(5, 6, 7, 0, 1, 2, 3, 4, i + 3)
      ROUND(4, 5, 6, 7, 0, 1, 2, 3, i + 4)
      ROUND(3, 4, 5, 6, 7, 0, 1, 2, i + 5)
      ROUND(2, 3, 4, 5, 6, 7, 0, 1, i + 6)
      ROUND(1, 2, 3, 4, 5, 6, 7, 0, i + 7)
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
  }
}

void tcr_sha256_start(tcr_sha256 *hash) {
  static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memset(hash, 0, sizeof *hash);
  memcpy(hash->state, start, sizeof start);
  hash->blocks = tcr_sha256_fast();
  if (hash->blocks == NULL) hash->blocks = portable_blocks;
}

void tcr_sha256_add(tcr_sha256 *hash, const void *data, size_t bytes) {
  const uint8_t *from = data;
  size_t held = (size_t)(hash->length % 64);
  if (bytes == 0) return;
  hash->length += bytes;
  if (held != 0) {
    size_t part = bytes < 64 - held ? bytes : 64 - held;
    memcpy(hash->block + held, from, part);
    if (held + part < 64) return;
    hash->blocks(hash->state, hash->block, 1);
    from += part;
    bytes -= part;
  }
  if (bytes >= 64) hash->blocks(hash->state, from, bytes / 64);
  memcpy(hash->block, from + bytes / 64 * 64, bytes % 64);
}

void tcr_sha256_end(tcr_sha256 *hash, char digest[TCR_DIGEST + 1]) {
  static const char digit[] = "0123456789abcdef";
  uint64_t bits = hash->length * 8;
  uint8_t end[72] = {0x80};
  size_t held = (size_t)(hash->length % 64), pad = (held < 56 ? 56 : 120) - held;
  for (int i = 0; i < 8; i++) end[pad + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
  tcr_sha256_add(hash, end, pad + 8);
  memcpy(digest, "sha256:", 7);
  for (int i = 0; i < 32; i++) {
    unsigned byte = hash->state[i / 4] >> (24 - 8 * (i % 4)) & 255;
    digest[7 + 2 * i] = digit[byte >> 4];
    digest[8 + 2 * i] = digit[byte & 15];
  }
  digest[TCR_DIGEST] = 0;
}
