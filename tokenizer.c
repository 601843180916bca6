/* LLaMA 3's tokenizer: byte-level BPE, read from a Hugging Face tokenizer.json.
 *
 *   1  the tables: tokens by their bytes, merges by the pair that they join
 *   2  loading: tokenizer.json into the tables; what is not LLaMA 3's is refused
 *   3  splitting: text into pre-tokens, roughly words, as one regular expression says
 *   4  merging: the bytes of a pre-token into tokens
 *   5  encoding: added tokens such as <|eot_id|> are cut out, the rest goes through 3 and 4
 *   6  decoding: ids back into bytes, and bytes onto a terminal
 *
 * BPE (Sennrich et al., arXiv 1508.07909) starts from single bytes and joins neighbours, always
 * the pair that stands first in the list of merges, until no pair is in the list. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <utf8proc.h>

#include "qqq.h"

/* ---- 1 the tables --------------------------------------------------------------------------- */

typedef struct {
    char *bytes; // NULL: no token has this id
    int n;
    bool special; // decodes to nothing
} Token;

typedef struct {
    int left, right; // the pair of token ids
    int rank;        // its place in the list of merges, -1 in an empty slot
    int id;          // the token that the two become
} Merge;

typedef struct {
    char *text; // [n]
    int n;
    int id;
    bool special;        // plain text where the caller says so
    bool normalized;     // looked for after the others, in what they left
    bool lstrip, rstrip; // white space on this side of it goes with it
} Added;

struct Tokenizer {
    Token *tokens; // [size]
    Added *added;  // [n_added] sorted by text
    int *vocab;    // [vocab_mask + 1] hash table of model.vocab's ids by bytes, -1: empty
    Merge *merges; // [merge_mask + 1] hash table by pair
    size_t vocab_mask, merge_mask; // tables are powers of two in size and never full
    uint64_t key, multiplier;      // of their hashes
    int size, n_added;
    int byte_id[256];   // the tokens of single bytes
    bool ignore_merges; // a whole pre-token that is a token is not built from its bytes
};

static size_t table_size(int entries) {
    size_t size = 2;
    while (size <= (size_t)entries + entries / 2) size *= 2;
    return size;
}

/* Where a key has its place in a table of mask + 1 slots: the top bits of its product with a random
 * odd number (Dietzfelbinger et al., "A Reliable Randomized Algorithm for the Closest-Pair
 * Problem"). So no file can be made whose tokens or merges all have the same. */
static size_t first_slot(const Tokenizer *t, uint64_t key, size_t mask) {
    return (key * t->multiplier) >> __builtin_clzll(mask);
}

/* The random numbers that first_slot() needs; no id depends on them. */
static void seed_hashes(Tokenizer *t) {
    uint64_t random[2];
    double now = seconds(); // where there is nothing better
    if (getrandom(random, sizeof random, 0) != sizeof random) {
        memcpy(&random[0], &now, sizeof now);
        random[1] = random[0] * 0x9e3779b97f4a7c15 ^ (uintptr_t)t;
    }
    t->key = random[0];
    t->multiplier = random[1] | 1;
}

/* The slot in t->vocab of the token with these bytes, or the empty one where it would go. */
static int *vocab_slot(const Tokenizer *t, const char *bytes, int n) {
    uint64_t hash = t->key; // FNV-1a
    for (int i = 0; i < n; i++) hash = (hash ^ (uint8_t)bytes[i]) * 0x100000001b3;
    for (size_t i = first_slot(t, hash, t->vocab_mask);; i++) {
        int *slot = &t->vocab[i & t->vocab_mask];
        if (*slot < 0) return slot;
        const Token *token = &t->tokens[*slot];
        if (token->n == n && !memcmp(token->bytes, bytes, n)) return slot;
    }
}

/* The slot in t->merges of this pair, or the empty one where it would go. */
static Merge *merge_slot(const Tokenizer *t, int left, int right) {
    uint64_t pair = (uint64_t)left << 32 | (uint32_t)right;
    for (size_t i = first_slot(t, pair, t->merge_mask);; i++) {
        Merge *slot = &t->merges[i & t->merge_mask];
        if (slot->rank < 0 || (slot->left == left && slot->right == right)) return slot;
    }
}

/* The alphabet of GPT-2, in which tokenizer.json spells bytes: printable bytes stand for
 * themselves, the others in order for code points 256 to 323. Returns -1 outside of it. */
static int alphabet_byte(int32_t code) {
    if ((code >= '!' && code <= '~') || (code >= 161 && code <= 172)) return code;
    if (code >= 174 && code <= 255) return code;
    if (code >= 256 && code <= 288) return code - 256;
    if (code >= 289 && code <= 322) return code - 289 + 127;
    return code == 323 ? 173 : -1;
}

/* Writes the bytes that text [n] spells to out, which may be text. Returns how many, or -1. */
static int spelled_bytes(const char *text, size_t n, char *out) {
    int count = 0;
    while (n > 0) {
        int32_t code;
        utf8proc_ssize_t length = utf8proc_iterate((const uint8_t *)text, n, &code);
        if (length < 0 || alphabet_byte(code) < 0) return -1;
        out[count++] = (char)alphabet_byte(code);
        text += length;
        n -= length;
    }
    return count;
}

/* The id of the token of model.vocab that is spelled so, or -1. */
static int vocab_id(const Tokenizer *t, const char *text, size_t n) {
    char *bytes = allocate(n, 1);
    int n_bytes = spelled_bytes(text, n, bytes);
    int id = n_bytes < 0 ? -1 : *vocab_slot(t, bytes, n_bytes);
    free(bytes);
    return id;
}

/* ---- 2 loading ------------------------------------------------------------------------------ */

/* The pattern that section 3 implements. */
static const char SPLIT[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/* The file being loaded: its name for messages, and what is in it. */
typedef struct {
    const char *name;
    const Json *json;
} File;

enum { MAX_ID = 1 << 24 }; // above every token's id

/* What stands at a node, on one line, for a message that ends the program. */
static const char *shown(const File *f, int node) {
    char type = json_type(f->json, node);
    if (type == '{' || type == '[') return type == '{' ? "an object" : "an array";
    if (type != '"') return type == 'p' ? "a number, true, false or null" : "missing";
    size_t bytes;
    char *text = json_string(f->json, node, &bytes);
    for (size_t i = 0; i < bytes; i++)
        if ((uint8_t)text[i] < ' ' || text[i] == 127) text[i] = '?';
    return text;
}

/* A member of this type, as json_type() has it. */
static int member(const File *f, int object, const char *key, char type) {
    int node = json_get(f->json, object, key);
    if (json_type(f->json, node) == type) return node;
    die("%s: \"%s\" is %.200s, expected %s", f->name, key, shown(f, node),
        type == '{'   ? "an object"
        : type == '[' ? "an array"
                      : "a string");
}

/* A member that must be the string `expected`; `where` says in a message what the object is. */
static void expect(const File *f, const char *where, int object, const char *key,
                   const char *expected) {
    int node = json_get(f->json, object, key);
    if (json_is(f->json, node, expected)) return;
    die("%s: %s.%s is %.200s, expected \"%s\"", f->name, where, key, shown(f, node), expected);
}

/* A member that would change text or tokens if it were there: only null, "", 0 or an empty sequence
 * of normalizers will do. */
static void expect_none(const File *f, int object, const char *key) {
    int node = json_get(f->json, object, key), list = json_get(f->json, node, "normalizers");
    double zero;
    if (json_absent(f->json, node) || json_is(f->json, node, "")) return;
    if (json_number(f->json, node, &zero) && zero == 0) return;
    if (json_type(f->json, list) == '[' && json_first(f->json, list) < 0) return;
    die("%s: \"%s\" is %.200s, expected null", f->name, key, shown(f, node));
}

/* A member that is true or false, `missing` if it is not there. */
static bool flag(const File *f, int object, const char *key, bool missing) {
    int node = json_get(f->json, object, key);
    if (node < 0) return missing;
    bool is_true = json_is(f->json, node, "true");
    if (json_type(f->json, node) == 'p' && (is_true || json_is(f->json, node, "false")))
        return is_true;
    die("%s: \"%s\" is %.200s, expected true or false", f->name, key, shown(f, node));
}

static int count_children(const Json *json, int node) {
    int count = 0;
    for (int i = json_first(json, node); i >= 0; i = json_next(json, node, i)) count++;
    return count;
}

/* The steps before BPE must be LLaMA 3's: no normalizer, a split by its pattern, then bytes. */
static void check_steps(const File *f) {
    expect_none(f, 0, "normalizer");
    int steps = member(f, 0, "pre_tokenizer", '{');
    expect(f, "pre_tokenizer", steps, "type", "Sequence");
    int list = member(f, steps, "pretokenizers", '[');
    if (count_children(f->json, list) != 2)
        die("%s: \"pretokenizers\" are not two, Split and ByteLevel", f->name);
    int split = json_first(f->json, list), level = json_next(f->json, list, split);
    expect(f, "pretokenizers[0]", split, "type", "Split");
    expect(f, "Split", split, "behavior", "Isolated");
    expect(f, "Split.pattern", member(f, split, "pattern", '{'), "Regex", SPLIT);
    expect(f, "pretokenizers[1]", level, "type", "ByteLevel");
    if (flag(f, split, "invert", false) || flag(f, level, "add_prefix_space", true) ||
        flag(f, level, "use_regex", true))
        die("%s: invert, add_prefix_space or use_regex is true, expected false", f->name);
}

/* The id at a node, of the token whose text is at another. */
static int token_id(const File *f, int text, int id_node) {
    double id;
    if (json_number(f->json, id_node, &id) && id >= 0 && id < MAX_ID && id == (int)id) return id;
    die("%s: the id of token %.200s is no integer in 0..%d", f->name, shown(f, text), MAX_ID - 1);
}

/* Enters a token whose text is at this node, in ids that may have holes. Takes over its bytes. */
static void put_token(Tokenizer *t, const File *f, int text, int id, char *bytes, int n) {
    if (id >= t->size) {
        int size = id < 2 * t->size ? 2 * t->size : id + 1;
        t->tokens = realloc(t->tokens, size * sizeof *t->tokens);
        if (!t->tokens) die("out of memory");
        memset(t->tokens + t->size, 0, (size - t->size) * sizeof *t->tokens);
        t->size = size;
    }
    if (t->tokens[id].bytes)
        die("%s: the id of token %.200s, %d, is another's too", f->name, shown(f, text), id);
    t->tokens[id] = (Token){bytes, n, false};
}

/* Returns how many tokens there are. */
static int load_vocab(Tokenizer *t, const File *f, int vocab) {
    int count = 0;
    for (int i = json_first(f->json, vocab); i >= 0; i = json_next(f->json, vocab, i)) {
        size_t length;
        char *bytes = json_string(f->json, i, &length);
        int n = spelled_bytes(bytes, length, bytes);
        if (n < 0)
            die("%s: token %.200s of model.vocab has a character that stands for no byte", f->name,
                shown(f, i));
        int *slot = vocab_slot(t, bytes, n);
        int id = token_id(f, i, i + 1);
        count += *slot < 0;
        if (*slot >= 0) { // there twice: the last one counts
            free(t->tokens[*slot].bytes);
            t->tokens[*slot] = (Token){0};
        }
        put_token(t, f, i, id, bytes, n);
        *slot = id;
    }
    for (int byte = 0; byte < 256; byte++) {
        t->byte_id[byte] = *vocab_slot(t, &(char){(char)byte}, 1);
        if (t->byte_id[byte] < 0)
            die("%s: model.vocab has no token for the single byte 0x%02x", f->name, byte);
    }
    return count;
}

/* A merge as "a b", which the file has as "a b" or as ["a", "b"]; NULL if it has neither. */
static char *merge_text(const Json *json, int node, size_t *n) {
    if (json_type(json, node) == '"') return json_string(json, node, n);
    if (json_type(json, node) != '[' || count_children(json, node) != 2) return NULL;
    int a = json_first(json, node), b = json_next(json, node, a);
    if (json_type(json, a) != '"' || json_type(json, b) != '"') return NULL;
    size_t n_left, n_right;
    char *left = json_string(json, a, &n_left), *right = json_string(json, b, &n_right);
    *n = n_left + 1 + n_right;
    char *text = allocate(*n, 1);
    memcpy(text, left, n_left);
    text[n_left] = ' ';
    memcpy(text + n_left + 1, right, n_right);
    free(left);
    free(right);
    return text;
}

/* The merge that "a b", text [n], describes; its id is -1 if a, b or ab is no token. Overwrites
 * text with the bytes of a and, right behind them, those of b. */
static Merge merge_parse(const Tokenizer *t, char *text, size_t n) {
    Merge merge = {.id = -1};
    char *space = text ? memchr(text, ' ', n) : NULL;
    int n_left = space ? spelled_bytes(text, space - text, text) : -1;
    if (n_left < 0) return merge;
    int n_right = spelled_bytes(space + 1, text + n - (space + 1), text + n_left);
    if (n_right < 0) return merge;
    merge.left = *vocab_slot(t, text, n_left);
    merge.right = *vocab_slot(t, text + n_left, n_right);
    if (merge.left >= 0 && merge.right >= 0) merge.id = *vocab_slot(t, text, n_left + n_right);
    return merge;
}

static void load_merges(Tokenizer *t, const File *f, int merges) {
    int rank = 0;
    for (int i = json_first(f->json, merges); i >= 0; i = json_next(f->json, merges, i)) {
        size_t n = 0;
        char *text = merge_text(f->json, i, &n);
        Merge merge = merge_parse(t, text, n);
        if (merge.id < 0)
            die("%s: model.merges[%d] is %.200s, expected \"a b\" or [\"a\", \"b\"] with a, b and "
                "ab in model.vocab",
                f->name, rank, shown(f, i));
        merge.rank = rank++;
        *merge_slot(t, merge.left, merge.right) = merge;
        free(text);
    }
}

enum { MAX_ADDED = 512 }; // bytes of an added token, so that looking for them takes linear time

/* Bytewise, a text before those that it begins. */
static int compare_added(const void *a, const void *b) {
    const Added *x = a, *y = b;
    int order = memcmp(x->text, y->text, x->n < y->n ? x->n : y->n);
    return order ? order : x->n - y->n;
}

/* The tokenizers library numbers added tokens itself: one that the vocabulary has keeps that id,
 * the others follow the vocabulary of n_vocab tokens and each other. */
static void load_added(Tokenizer *t, const File *f, int list, int n_vocab) {
    int next = n_vocab;
    for (int i = json_first(f->json, list); i >= 0; i = json_next(f->json, list, i)) {
        int content = member(f, i, "content", '"');
        if (flag(f, i, "single_word", false))
            die("%s: added token %.200s has single_word, which is not supported", f->name,
                shown(f, content));
        size_t n;
        char *text = json_string(f->json, content, &n);
        if (n < 1 || n > MAX_ADDED)
            die("%s: added token %.200s is %zu bytes long, expected 1 to %d", f->name,
                shown(f, content), n, MAX_ADDED);
        int id = token_id(f, content, json_get(f->json, i, "id")), known = vocab_id(t, text, n);
        if (id != (known < 0 ? next : known))
            die("%s: added token %.200s has the id %d, transformers gives it %d", f->name,
                shown(f, content), id, known < 0 ? next : known);
        if (known < 0) put_token(t, f, content, id, format_text("%s", text), (int)n);
        if (id >= next) next = id + 1;
        Added added = {text,
                       (int)n,
                       id,
                       flag(f, i, "special", false),
                       flag(f, i, "normalized", false),
                       flag(f, i, "lstrip", false),
                       flag(f, i, "rstrip", false)};
        t->tokens[id].special = added.special;
        t->added[t->n_added++] = added;
    }
    qsort(t->added, t->n_added, sizeof *t->added, compare_added);
    for (int i = 1; i < t->n_added; i++)
        if (compare_added(&t->added[i - 1], &t->added[i]) == 0)
            die("%s: added tokens %d and %d have the same content", f->name, t->added[i - 1].id,
                t->added[i].id);
}

Tokenizer *tokenizer_load(const char *name, const char *text, size_t bytes) {
    Json *json = json_parse(name, text, bytes);
    const File f = {name, json};
    int model = member(&f, 0, "model", '{');
    expect(&f, "model", model, "type", "BPE");
    expect_none(&f, model, "dropout");
    expect_none(&f, model, "continuing_subword_prefix");
    expect_none(&f, model, "end_of_word_suffix");
    int vocab = member(&f, model, "vocab", '{'), merges = member(&f, model, "merges", '[');
    int added = json_get(json, 0, "added_tokens");
    check_steps(&f);

    int n_vocab = count_children(json, vocab), n_added = count_children(json, added);
    Tokenizer *t = allocate(1, sizeof *t);
    seed_hashes(t);
    t->ignore_merges = flag(&f, model, "ignore_merges", false);
    t->size = n_vocab + n_added + 1;
    t->tokens = allocate(t->size, sizeof *t->tokens);
    t->added = allocate(n_added, sizeof *t->added);
    t->vocab_mask = table_size(n_vocab) - 1;
    t->vocab = allocate(t->vocab_mask + 1, sizeof *t->vocab);
    for (size_t i = 0; i <= t->vocab_mask; i++) t->vocab[i] = -1;
    t->merge_mask = table_size(count_children(json, merges)) - 1;
    t->merges = allocate(t->merge_mask + 1, sizeof *t->merges);
    for (size_t i = 0; i <= t->merge_mask; i++) t->merges[i].rank = -1;

    n_vocab = load_vocab(t, &f, vocab);
    load_merges(t, &f, merges);
    load_added(t, &f, added, n_vocab);
    while (t->size > 0 && !t->tokens[t->size - 1].bytes) t->size--;
    json_free(json);
    return t;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    for (int i = 0; i < t->size; i++) free(t->tokens[i].bytes);
    for (int i = 0; i < t->n_added; i++) free(t->added[i].text);
    free(t->tokens);
    free(t->vocab);
    free(t->merges);
    free(t->added);
    free(t);
}

int tokenizer_size(const Tokenizer *t) {
    return t->size;
}

int tokenizer_id(const Tokenizer *t, const char *token) {
    const Added key = {.text = (char *)token, .n = (int)strlen(token)};
    const Added *added = bsearch(&key, t->added, t->n_added, sizeof key, compare_added);
    return added ? added->id : vocab_id(t, token, key.n);
}

/* ---- 3 splitting ---------------------------------------------------------------------------- */

/* The kinds of characters that the pattern tells apart, as bits, so that | makes a class. */
enum { LETTER = 1, NUMBER = 2, NEWLINE = 4, SPACE = 8, OTHER = 16 };

/* The kind of the first character of s [n] and its length; 0 at the end. A byte that is not UTF-8
 * counts as a character of its own, of kind OTHER. SPACE is \s without CR and LF. */
static int char_kind(const char *s, size_t n, size_t *length) {
    *length = n > 0;
    if (n == 0) return 0;
    int32_t code;
    utf8proc_ssize_t bytes = utf8proc_iterate((const uint8_t *)s, n, &code);
    if (bytes < 0) return OTHER;
    *length = bytes;
    if (code == '\r' || code == '\n') return NEWLINE;
    if (code == '\t' || code == '\v' || code == '\f' || code == 0x85) return SPACE;
    int category = utf8proc_category(code); // in the order L*, M*, N*, P*, S*, Z*, C*
    if (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO) return LETTER;
    if (category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO) return NUMBER;
    if (category >= UTF8PROC_CATEGORY_ZS && category <= UTF8PROC_CATEGORY_ZP) return SPACE;
    return OTHER;
}

/* The length of the characters of these kinds at the start of s [n], at most `most` of them. */
static size_t run(const char *s, size_t n, int kinds, size_t most) {
    size_t i = 0, length;
    while (most-- > 0 && char_kind(s + i, n - i, &length) & kinds) i += length;
    return i;
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d), where case folding makes the long s of old prints an s too. */
static size_t contraction(const char *s, size_t n) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d", "\u017f"};
    if (n == 0 || *s != '\'') return 0;
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t length = strlen(endings[i]);
        if (length < n && !strncasecmp(s + 1, endings[i], length)) return 1 + length;
    }
    return 0;
}

/* The length of the first pre-token of s [n], n > 0: the first alternative of SPLIT that matches.
 * Every kind of character starts one of them, so that the pre-tokens cover the text. */
static size_t pre_token(const char *s, size_t n) {
    size_t length = contraction(s, n);
    if (length) return length;

    size_t first, unused;
    int kind = char_kind(s, n, &first), next_kind = char_kind(s + first, n - first, &unused);
    // [^\r\n\p{L}\p{N}]?\p{L}+
    if (kind == LETTER || (kind & (SPACE | OTHER) && next_kind == LETTER))
        return first + run(s + first, n - first, LETTER, SIZE_MAX);
    // \p{N}{1,3}
    if (kind == NUMBER) return run(s, n, NUMBER, 3);
    //  ?[^\s\p{L}\p{N}]+[\r\n]*
    if (kind == OTHER || (*s == ' ' && next_kind == OTHER)) {
        length = first + run(s + first, n - first, OTHER, SIZE_MAX);
        return length + run(s + length, n - length, NEWLINE, SIZE_MAX);
    }
    // White space is left: where its last character starts and ends, and its last newline ends.
    size_t last = 0, end = 0, newline = 0, bytes;
    while ((kind = char_kind(s + end, n - end, &bytes)) & (SPACE | NEWLINE)) {
        last = end;
        end += bytes;
        if (kind == NEWLINE) newline = end;
    }
    if (newline) return newline;             // \s*[\r\n]+
    return last > 0 && end < n ? last : end; // \s+(?!\S) leaves one for what follows; \s+
}

/* ---- 4 merging ------------------------------------------------------------------------------ */

typedef struct {
    int id;         // -1: joined with the symbol to its left
    int prev, next; // neighbours in the pre-token, -1: none
} Symbol;

/* A text being encoded. */
typedef struct {
    const Tokenizer *t;
    bool special;    // special tokens are looked for
    int *ids;        // [n_ids] the result
    Symbol *symbols; // [n_symbols] one for each byte of the longest pre-token so far
    uint64_t *heap;  // [n_heap] of [2 n_symbols] possible merges, the next one at heap[0]
    int n_ids, n_symbols;
    size_t n_heap;
} Encoder;

/* Enters the merge of symbol `left` and its right neighbour, if there is one, into the heap. The
 * key is rank << 32 | left: lowest rank first, leftmost first among equals. */
static void push_merge(Encoder *e, int left) {
    int right = e->symbols[left].next;
    if (right < 0) return;
    const Merge *merge = merge_slot(e->t, e->symbols[left].id, e->symbols[right].id);
    if (merge->rank < 0) return;
    uint64_t key = (uint64_t)merge->rank << 32 | (uint32_t)left;
    size_t i = e->n_heap++;
    for (; i > 0 && e->heap[(i - 1) / 2] > key; i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = key;
}

static uint64_t pop_merge(Encoder *e) {
    uint64_t top = e->heap[0], last = e->heap[--e->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < e->n_heap; i = child) {
        if (child + 1 < e->n_heap && e->heap[child + 1] < e->heap[child]) child++;
        if (last <= e->heap[child]) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

/* BPE of one pre-token s [n], n > 0, in n log n time: symbols are a linked list, and each join
 * takes one merge out of the heap and enters at most two. */
static void encode_pre_token(Encoder *e, const char *s, int n) {
    const Tokenizer *t = e->t;
    int whole = t->ignore_merges ? *vocab_slot(t, s, n) : -1;
    if (whole >= 0) {
        e->ids[e->n_ids++] = whole;
        return;
    }
    if (n > e->n_symbols) {
        free(e->symbols);
        free(e->heap);
        e->n_symbols = n < 128 ? 128 : n;
        e->symbols = allocate(e->n_symbols, sizeof *e->symbols);
        e->heap = allocate(e->n_symbols, 2 * sizeof *e->heap);
    }
    Symbol *symbols = e->symbols;
    for (int i = 0; i < n; i++)
        symbols[i] = (Symbol){t->byte_id[(uint8_t)s[i]], i - 1, i + 1 < n ? i + 1 : -1};
    for (int i = 0; i < n; i++) push_merge(e, i);
    while (e->n_heap > 0) {
        uint64_t key = pop_merge(e);
        int left = (int)(uint32_t)key, right = symbols[left].next;
        if (symbols[left].id < 0 || right < 0) continue;
        // A symbol that was joined since makes another pair, of another rank or none.
        const Merge *merge = merge_slot(t, symbols[left].id, symbols[right].id);
        if (merge->rank != (int)(key >> 32)) continue;
        symbols[left] = (Symbol){merge->id, symbols[left].prev, symbols[right].next};
        symbols[right].id = -1;
        if (symbols[left].next >= 0) symbols[symbols[left].next].prev = left;
        if (symbols[left].prev >= 0) push_merge(e, symbols[left].prev);
        push_merge(e, left);
    }
    for (int i = 0; i >= 0; i = symbols[i].next)
        e->ids[e->n_ids++] = symbols[i].id; // NOLINT: n > 0, so there are symbols
}

/* ---- 5 encoding ----------------------------------------------------------------------------- */

/* Among added tokens lo..hi - 1, which share their first k bytes, the first whose byte k is at
 * least c; a token that ends there comes before all others. */
static int first_added(const Tokenizer *t, int lo, int hi, int k, int c) {
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        const Added *a = &t->added[mid];
        if (a->n == k || (uint8_t)a->text[k] < c) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

/* The longest added token that s [n] begins with, of those that are normalized or not; or NULL.
 * Byte by byte it narrows the range of those that agree so far. */
static const Added *find_added(const Tokenizer *t, bool normalized, const char *s, size_t n) {
    const Added *longest = NULL;
    int lo = 0, hi = t->n_added;
    for (size_t k = 0; k < n && lo < hi; k++) {
        lo = first_added(t, lo, hi, (int)k, (uint8_t)s[k]);
        hi = first_added(t, lo, hi, (int)k, (uint8_t)s[k] + 1);
        const Added *a = &t->added[lo];
        if (lo < hi && (size_t)a->n == k + 1 && a->normalized == normalized) longest = a;
    }
    return longest;
}

static void encode_plain(Encoder *e, const char *s, size_t n) {
    for (size_t i = 0, length; i < n; i += length) {
        length = pre_token(s + i, n - i);
        encode_pre_token(e, s + i, (int)length);
    }
}

/* Bytes of the white space at the end of s [n]. */
static size_t space_before(const char *s, size_t n) {
    size_t end = n, length;
    for (size_t i = n; i-- > 0;) {
        if ((s[i] & 0xc0) == 0x80) continue; // within a character
        if (!(char_kind(s + i, end - i, &length) & (SPACE | NEWLINE))) break;
        end = i;
    }
    return n - end;
}

/* Cuts the text at its added tokens, first at those that are not normalized, then what is between
 * them at those that are. A special token that is not looked for still hides what it overlaps. */
static void encode_added(Encoder *e, const char *s, size_t n, bool normalized) {
    size_t start = 0; // of the text since the last added token
    for (size_t i = 0; i <= n;) {
        const Added *added = find_added(e->t, normalized, s + i, n - i);
        bool cut = added && (e->special || !added->special);
        size_t end = i < start ? start : i;
        if (cut && added->lstrip) end -= space_before(s + start, end - start);
        if ((cut || i == n) && normalized) encode_plain(e, s + start, end - start);
        if ((cut || i == n) && !normalized) encode_added(e, s + start, end - start, true);
        i += added ? added->n : 1;
        if (!cut) continue;
        e->ids[e->n_ids++] = added->id;
        start = i;
        if (added->rstrip) start += run(s + i, n - i, SPACE | NEWLINE, SIZE_MAX);
    }
}

int *tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, bool special,
                      int *count) {
    if (bytes > INT32_MAX) die("a text of %zu bytes is too long to be encoded", bytes);
    // No token is shorter than a byte.
    Encoder e = {.t = t, .special = special, .ids = allocate(bytes, sizeof(int))};
    encode_added(&e, text, bytes, false);
    free(e.symbols);
    free(e.heap);
    *count = e.n_ids;
    return e.ids;
}

/* ---- 6 decoding ----------------------------------------------------------------------------- */

const char *tokenizer_decode(const Tokenizer *t, int id, size_t *bytes) {
    bool known = id >= 0 && id < t->size && !t->tokens[id].special;
    *bytes = known ? t->tokens[id].n : 0;
    return *bytes ? t->tokens[id].bytes : "";
}

/* Bytes of the UTF-8 sequence that starts with this one; 1 for a byte that starts none. */
static int utf8_length(uint8_t first) {
    if (first < 0xc2 || first > 0xf4) return 1;
    return first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

static void write_pending(Utf8Stream *s, FILE *out) {
    fwrite(s->pending, 1, s->n_pending, out);
    s->n_pending = 0;
}

void utf8_write(Utf8Stream *s, const char *text, size_t bytes, bool flush, FILE *out) {
    for (size_t i = 0; i < bytes; i++) {
        bool continues = ((uint8_t)text[i] & 0xc0) == 0x80;
        if (!continues) write_pending(s, out); // what waits will never be finished
        s->pending[s->n_pending++] = text[i];
        if (s->n_pending == utf8_length((uint8_t)s->pending[0])) write_pending(s, out);
    }
    if (flush) write_pending(s, out);
}
