#include "json.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK 16384

struct json_chunk {
  struct json_chunk *next;
  size_t used, size;
};

typedef struct reader {
  json_document *document;
  const unsigned char *at, *end;
  const char *wrong;
  int depth;
} reader;

const char json_no_memory[] = "there is not enough memory to read it";

static void *allocate(reader *in, size_t bytes) {
  struct json_chunk *chunk = in->document->chunks;
  bytes = (bytes + 15) & ~(size_t)15;
  if (chunk == NULL || chunk->size - chunk->used < bytes) {
    size_t size = bytes > CHUNK ? bytes : CHUNK;
    chunk = malloc(sizeof *chunk + 16 + size);
    if (chunk == NULL) {
      in->wrong = json_no_memory;
      return NULL;
    }
    chunk->next = in->document->chunks;
    chunk->used = 0;
    chunk->size = size;
    in->document->chunks = chunk;
  }
  void *memory = (char *)chunk + ((sizeof *chunk + 15) & ~(size_t)15) + chunk->used;
  chunk->used += bytes;
  return memory;
}

static void skip_space(reader *in) {
  while (in->at < in->end && (*in->at == ' ' || *in->at == '\t' || *in->at == '\n' || *in->at == '\r')) in->at++;
}

static bool refuse(reader *in, const char *wrong) {
  if (in->wrong == NULL) in->wrong = wrong;
  return false;
}

static bool take(reader *in, const char *word) {
  size_t length = strlen(word);
  if ((size_t)(in->end - in->at) < length || memcmp(in->at, word, length) != 0) return refuse(in, "not a value");
  in->at += length;
  return true;
}

static bool hex4(reader *in, uint32_t *code) {
  *code = 0;
  if (in->end - in->at < 4) return refuse(in, "an unfinished escape");
  for (int i = 0; i < 4; i++) {
    unsigned c = *in->at++;
    unsigned digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : 16;
    if (digit == 16) return refuse(in, "an escape that is not hexadecimal");
    *code = *code << 4 | digit;
  }
  return true;
}

static char *put_utf8(char *to, uint32_t code) {
  if (code < 0x80) {
    *to++ = (char)code;
  } else if (code < 0x800) {
    *to++ = (char)(0xc0 | code >> 6);
    *to++ = (char)(0x80 | (code & 63));
  } else if (code < 0x10000) {
    *to++ = (char)(0xe0 | code >> 12);
    *to++ = (char)(0x80 | (code >> 6 & 63));
    *to++ = (char)(0x80 | (code & 63));
  } else {
    *to++ = (char)(0xf0 | code >> 18);
    *to++ = (char)(0x80 | (code >> 12 & 63));
    *to++ = (char)(0x80 | (code >> 6 & 63));
    *to++ = (char)(0x80 | (code & 63));
  }
  return to;
}

static bool escape(reader *in, char **to) {
  static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
  if (in->at >= in->end) return refuse(in, "an unfinished escape");
  char c = (char)*in->at++;
  if (c == 'u') {
    uint32_t code, low;
    if (!hex4(in, &code)) return false;
    if (code >= 0xd800 && code < 0xdc00 && in->end - in->at >= 2 && in->at[0] == '\\' && in->at[1] == 'u') {
      in->at += 2;
      if (!hex4(in, &low)) return false;
      if (low < 0xdc00 || low > 0xdfff) return refuse(in, "half a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    if (code == 0) return refuse(in, "a NUL character");
    if (code >= 0xd800 && code < 0xe000) return refuse(in, "half a surrogate pair");
    *to = put_utf8(*to, code);
    return true;
  }
  const char *found = c ? strchr(from, c) : NULL;
  if (found == NULL) return refuse(in, "an unknown escape");
  *(*to)++ = into[found - from];
  return true;
}

/* Copies one character of UTF-8, refusing overlong forms, surrogates and what lies past U+10FFFF. */
static bool utf8(reader *in, char **to) {
  unsigned first = *in->at;
  int more = first < 0x80                    ? 0
             : first >= 0xc2 && first < 0xe0 ? 1
             : first >= 0xe0 && first < 0xf0 ? 2
             : first >= 0xf0 && first < 0xf5 ? 3
                                             : -1;
  if (more < 0 || in->end - in->at <= more) return refuse(in, "not UTF-8");
  unsigned second = more ? in->at[1] : 0x80;
  if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90) ||
      (first == 0xf4 && second > 0x8f))
    return refuse(in, "not UTF-8");
  for (int i = 1; i <= more; i++)
    if ((in->at[i] & 0xc0) != 0x80) return refuse(in, "not UTF-8");
  for (int i = 0; i <= more; i++) *(*to)++ = (char)*in->at++;
  return true;
}

static const char *string(reader *in) {
  if (in->at >= in->end || *in->at != '"') {
    refuse(in, "a string is expected");
    return NULL;
  }
  size_t length = 0, left = (size_t)(in->end - ++in->at);
  while (length < left && in->at[length] != '"') length += in->at[length] == '\\' ? 2 : 1;
  if (length >= left) {
    refuse(in, "an unfinished string");
    return NULL;
  }
  char *text = allocate(in, length + 1), *to = text; /* no escape is shorter than what it means */
  if (text == NULL) return NULL;
  while (in->at < in->end && *in->at != '"') {
    if (*in->at < 0x20) {
      refuse(in, "a control character");
      return NULL;
    }
    if (*in->at == '\\' ? (in->at++, !escape(in, &to)) : !utf8(in, &to)) return NULL;
  }
  if (in->at >= in->end) {
    refuse(in, "an unfinished string");
    return NULL;
  }
  in->at++;
  *to = 0;
  return text;
}

static unsigned digits(reader *in, uint64_t *mantissa, int *exponent, int step) {
  unsigned count = 0;
  for (; in->at < in->end && *in->at >= '0' && *in->at <= '9'; in->at++, count++) {
    if (*mantissa <= (UINT64_MAX - 9) / 10) {
      *mantissa = *mantissa * 10 + (*in->at - '0');
      *exponent -= step;
    } else {
      *exponent += 1 - step;
    }
  }
  return count;
}

/* Exact for up to 19 digits that double can hold and powers up to 10^22, else off by a few units in the last place.
 * Not strtod, which takes its decimal point from the program's locale. */
static double scaled(uint64_t mantissa, int exponent) {
  double value = (double)mantissa, power = 1, base = 10;
  int left = exponent < 0 ? -exponent : exponent;
  if (mantissa == 0) return 0;
  if (left > 700) left = 700;
  if (left > 300) { /* in two steps, since 10^left is no double */
    double part = 1;
    for (int i = 0; i < left - 300; i++) part *= 10;
    value = exponent < 0 ? value / part : value * part;
    left = 300;
  }
  for (; left; left >>= 1, base *= base)
    if (left & 1) power *= base;
  return exponent < 0 ? value / power : value * power;
}

static bool number(reader *in, json_value *value) {
  bool negative = *in->at == '-';
  uint64_t mantissa = 0;
  int exponent = 0;
  if (negative) in->at++;
  const unsigned char *start = in->at;
  unsigned whole = digits(in, &mantissa, &exponent, 0);
  if (whole == 0) return refuse(in, "not a value");
  if (whole > 1 && *start == '0') return refuse(in, "a number with a leading zero");
  value->integer = exponent == 0;
  if (in->at < in->end && *in->at == '.') {
    in->at++;
    value->integer = false;
    if (digits(in, &mantissa, &exponent, 1) == 0) return refuse(in, "a number without digits after its point");
  }
  if (in->at < in->end && (*in->at | 32) == 'e') {
    uint64_t power = 0;
    int ignored = 0;
    in->at++;
    value->integer = false;
    bool down = in->at < in->end && *in->at == '-';
    if (in->at < in->end && (*in->at == '-' || *in->at == '+')) in->at++;
    if (digits(in, &power, &ignored, 0) == 0) return refuse(in, "a number without digits in its exponent");
    int step = power > 100000 ? 100000 : (int)power;
    exponent += down ? -step : step;
  }
  value->kind = JSON_NUMBER;
  value->as.number = negative ? -scaled(mantissa, exponent) : scaled(mantissa, exponent);
  if (mantissa > INT64_MAX) value->integer = false;
  if (value->integer) value->whole = negative ? -(int64_t)mantissa : (int64_t)mantissa;
  if (value->as.number - value->as.number != 0) return refuse(in, "a number that is too large");
  return true;
}

static json_value *element(reader *in, const char *key);

static bool children(reader *in, json_value *value, char close) {
  json_value **last = &value->as.first;
  *last = NULL;
  if (++in->depth > JSON_MAX_DEPTH) return refuse(in, "too many levels");
  in->at++;
  skip_space(in);
  if (in->at < in->end && *in->at == (unsigned char)close) {
    in->at++;
    in->depth--;
    return true;
  }
  for (;;) {
    const char *key = NULL;
    skip_space(in);
    if (close == '}') {
      if ((key = string(in)) == NULL) return false;
      skip_space(in);
      if (in->at >= in->end || *in->at++ != ':') return refuse(in, "a colon is expected");
    }
    json_value *child = element(in, key);
    if (child == NULL) return false;
    *last = child;
    last = &child->next;
    value->count++;
    skip_space(in);
    if (in->at >= in->end) return refuse(in, "it ends too early");
    char c = (char)*in->at++;
    if (c == close) break;
    if (c != ',') return refuse(in, "a comma is expected");
  }
  in->depth--;
  return true;
}

static bool content(reader *in, json_value *value) {
  switch (*in->at) {
    case '{': value->kind = JSON_OBJECT; return children(in, value, '}');
    case '[': value->kind = JSON_LIST; return children(in, value, ']');
    case '"': value->kind = JSON_STRING; return (value->as.text = string(in)) != NULL;
    case 't':
      value->kind = JSON_BOOL;
      value->truth = true;
      return take(in, "true");
    case 'f': value->kind = JSON_BOOL; return take(in, "false");
    case 'n': return take(in, "null");
    default: return number(in, value);
  }
}

static json_value *element(reader *in, const char *key) {
  skip_space(in);
  if (in->at >= in->end) {
    refuse(in, "it ends too early");
    return NULL;
  }
  if (++in->document->values > JSON_MAX_VALUES) {
    refuse(in, "too many values");
    return NULL;
  }
  json_value *value = allocate(in, sizeof *value);
  if (value == NULL) return NULL;
  memset(value, 0, sizeof *value);
  value->key = key;
  return content(in, value) ? value : NULL;
}

const char *json_parse(json_document *document, const char *text, size_t bytes, size_t *offset) {
  const unsigned char *start = (const unsigned char *)text;
  reader in = {document, start, start + bytes, NULL, 0};
  memset(document, 0, sizeof *document);
  *offset = 0;
  if (bytes > JSON_MAX_BYTES) return "too large";
  document->root = element(&in, NULL);
  skip_space(&in);
  if (document->root != NULL && in.at != in.end) refuse(&in, "text after the value");
  *offset = (size_t)(in.at - start);
  if (in.wrong != NULL) json_free(document);
  return in.wrong;
}

void json_free(json_document *document) {
  struct json_chunk *chunk = document->chunks;
  while (chunk != NULL) {
    struct json_chunk *next = chunk->next;
    free(chunk);
    chunk = next;
  }
  memset(document, 0, sizeof *document);
}
