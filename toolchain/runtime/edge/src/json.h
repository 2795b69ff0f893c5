/* JSON (RFC 8259), strict: no more depth, values and bytes than the bounds below, so that a hostile file is refused. */
#ifndef TCR_JSON_H
#define TCR_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define JSON_MAX_BYTES (4u << 20)
#define JSON_MAX_DEPTH 64
#define JSON_MAX_VALUES (1u << 18)

typedef enum json_kind { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_LIST, JSON_OBJECT } json_kind;

typedef struct json_value {
  const char *key; /* in an object */
  struct json_value *next;
  uint32_t count; /* of children */
  uint8_t kind;
  bool truth;   /* of a bool */
  bool integer; /* a number written without fraction and exponent that fits */
  union {
    const char *text;
    double number;
    struct json_value *first;
  } as;
  int64_t whole;
} json_value;

typedef struct json_document {
  const json_value *root;
  struct json_chunk *chunks;
  uint32_t values;
} json_document;

/* Returns NULL, or what is wrong, e.g. "text after the value"; *offset tells where. */
const char *json_parse(json_document *document, const char *text, size_t bytes, size_t *offset);
extern const char json_no_memory[]; /* what json_parse returns when that is the reason */
void json_free(json_document *document);

/* The value of a key; NULL when there is none or this is no object.  The last one counts where a key is repeated. */
const json_value *json_get(const json_value *object, const char *key);
/* The text of a string, or NULL. */
const char *json_text(const json_value *value);
bool json_is(const json_value *value, json_kind kind);
/* Whether an object holds this text under a key. */
bool json_text_is(const json_value *object, const char *key, const char *text);
bool json_equal(const json_value *one, const json_value *other);

#endif
