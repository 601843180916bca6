/* Tests of tokenizer.c: the cases of Hugging Face's tokenizers for the tiny and the real tokenizer,
 * each rule of it in a small tokenizer made here, any bytes there and back, and broken files. */
#define _GNU_SOURCE
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "test.h"

static const char TINY[] = "data/tiny/tokenizer.json";
static const char TINY_CASES[] = "test/data/tokenizer_cases.json";
static const char REAL[] = "../shared/llama3.1/tokenizer.json";
static const char REAL_CASES[] = "../shared/llama3.1/tokenizer_cases.json";

static Tokenizer *load_file(const char *path) {
    size_t bytes;
    char *text = read_file(path, &bytes);
    if (!text) die("%s: missing", path);
    Tokenizer *t = tokenizer_load(path, text, bytes);
    free(text);
    return t;
}

/* ---- the small tokenizer -------------------------------------------------------------------- */

/* Writes bytes as model.vocab spells them, the inside of a JSON string. */
static void spell(FILE *f, const char *bytes, size_t n) {
    int code[256], next = 256; // GPT-2's bytes_to_unicode()
    for (int b = 0; b < 256; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        code[b] = printable ? b : next++;
    }
    for (size_t i = 0; i < n; i++) {
        int c = code[(uint8_t)bytes[i]];
        if (c == '"' || c == '\\') fputc('\\', f);
        if (c >= 0x80) fputc(0xc0 | c >> 6, f);
        fputc(c < 0x80 ? c : 0x80 | (c & 0x3f), f);
    }
}

/* A tokenizer.json with the 256 bytes as tokens 0 to 255, and these parts. malloc'ed. */
static char *small_json(const char *vocab, const char *merges, const char *ignore_merges,
                        const char *added) {
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    fprintf(
        f,
        "{\"added_tokens\":[%s],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"Sequence\","
        "\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\""
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}|"
        " ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"},"
        "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\","
        "\"add_prefix_space\":false,\"use_regex\":false}]},\"model\":{\"type\":\"BPE\","
        "\"dropout\":null,\"ignore_merges\":%s,\"vocab\":{",
        added, ignore_merges);
    for (int b = 0; b < 256; b++) {
        fputc('"', f);
        spell(f, &(char){(char)b}, 1);
        fprintf(f, "\":%d%s", b, b < 255 ? "," : "");
    }
    fprintf(f, "%s},\"merges\":[%s]}}", vocab, merges);
    fclose(f);
    return text;
}

static Tokenizer *load_small(const char *vocab, const char *merges, const char *ignore_merges,
                             const char *added) {
    char *text = small_json(vocab, merges, ignore_merges, added);
    Tokenizer *t = tokenizer_load("small", text, strlen(text));
    free(text);
    return t;
}

/* Checks that text [n] becomes exactly these ids. */
static void check_ids(const Tokenizer *t, const char *text, size_t n, bool special,
                      const int *expected, int n_expected) {
    int count;
    int *ids = tokenizer_encode(t, text, n, special, &count);
    bool same = count == n_expected;
    for (int i = 0; same && i < count; i++) same = ids[i] == expected[i];
    if (!check(same, "\"%.60s\" became %d ids, not the %d expected:", text, count, n_expected)) {
        for (int i = 0; i < count && i < 40; i++) printf("%s%d", i ? " " : "     ", ids[i]);
        printf("\n");
    }
    free(ids);
}

/* The same, with the ids as text: "256 99". */
static void check_text(const Tokenizer *t, const char *text, bool special, const char *expected) {
    int ids[64], n = 0;
    for (char *end; *expected; expected = end) ids[n++] = (int)strtol(expected, &end, 10);
    check_ids(t, text, strlen(text), special, ids, n);
}

/* ---- encoding ------------------------------------------------------------------------------- */

/* All [text, ids] of a file. */
static void check_cases(const char *tokenizer, const char *cases) {
    size_t bytes, n_text;
    char *text = read_file(cases, &bytes);
    if (!check(text, "%s: missing", cases)) return;
    Tokenizer *t = load_file(tokenizer);
    Json *json = json_parse(cases, text, bytes);
    int n_cases = 0;
    for (int i = json_first(json, 0); i >= 0; i = json_next(json, 0, i), n_cases++) {
        int string = json_first(json, i), list = json_next(json, i, string);
        // tiny's cases begin with the BOS, which tokenizer_encode() leaves to its caller.
        int ids[256], n = 0;
        for (int j = json_first(json, list); j >= 0; j = json_next(json, list, j)) {
            double id;
            json_number(json, j, &id);
            bool bos = n == 0 && tokenizer == TINY && j == json_first(json, list);
            if (!bos) ids[n++] = (int)id;
        }
        char *s = json_string(json, string, &n_text);
        check_ids(t, s, n_text, true, ids, n);
        free(s);
    }
    check(n_cases > 0, "%s: no cases", cases);
    json_free(json);
    tokenizer_free(t);
    free(text);
}

/* Pre-tokens, divided by '|'; '~' stands for a NUL. What Hugging Face's tokenizers 0.23 says, but
 * for the last two, which are no UTF-8. */
static const char *const splits[] = {
    "Hello| world",
    "I|'ll| don|'t| WE|'RE| he|'D|'d| you|'Ve",
    "'s|foo",
    "a| '|foo",
    "a| '|Sx",
    "x|'RE|ad|'S|foo",
    "x|'ſ|t",
    "'rx| '|ly",
    "''|s",
    "123|456|7| |٣٤٥|٦",
    "a|1|b|22²|½Ⅷ|x",
    "naïve| café日本語| 한국어",
    "e|\u0301x",
    "\u0301\u0301|abc",
    " !?..\r\n\n|x",
    "hi|!!\n\n| \n|x",
    " | two|  | three| ",
    "\n|xy|\r|xyz",
    "\t|\tx",
    "\t|1",
    "a| \n| b",
    "a|\r\n\r\n|  | x",
    "   \n",
    "\n\n\n",
    "    ",
    "x|  |\u00a0y",
    "\u00a0|\u2003x| \u3000| |1",
    "\u2028\n|\u2029| x|\xc2\x85y",
    "\u00a0|!!",
    "\xc2\x85|\xc2\x85xy",
    "\u2029|\u2029xy",
    "\u200bx|\u180e|1",
    "\034\035|x| ~~| ~|a",
    "🙂🙃| 🙂|a",
    "$|5| $|a",
    " | $",
    "_a|__|b",
    "(x|)| [|y|]",
    "\v\f| a",
    "\u1680 |\u205f|1",
    "ǅʰªא",
    "a|\ufeffb",
    "\xff\xe2\x82| \xf0\xc3|1|\xc3z|\xed\xa0\x80\n|\xc0\xaf|1",
    " \xe2\x82| \xc2\x85| x|\xc2",
};

/* With ignore_merges and no merges, pieces that are all in the vocabulary are found only if the
 * text was cut into them and nothing else. */
static void check_split(const char *pieces) {
    char text[128], *vocab;
    size_t n = 0, bytes;
    int ids[64], n_ids = 0, next = 256;
    FILE *f = open_memstream(&vocab, &bytes);
    for (const char *piece = pieces; *piece; n_ids++) {
        size_t start = n, length = strcspn(piece, "|");
        for (size_t i = 0; i < length; i++) text[n++] = piece[i] == '~' ? 0 : piece[i];
        ids[n_ids] = length == 1 ? (uint8_t)text[start] : next++;
        if (length > 1) {
            fprintf(f, ",\"");
            spell(f, text + start, length);
            fprintf(f, "\":%d", ids[n_ids]);
        }
        piece += length + (piece[length] == '|');
    }
    fclose(f);
    Tokenizer *t = load_small(vocab, "", "true", "");
    check_ids(t, text, n, true, ids, n_ids);
    tokenizer_free(t);
    free(vocab);
}

static void test_merging(void) {
    static const char vocab[] = ",\"ab\":256,\"bc\":257,\"abc\":258,\"aa\":259,\"cd\":260,"
                                "\"\\u0120a\":261,\"xyz\":262,\"aaa\":263,\"ef\":264,\"def\":265";
    static const char strings[] =
        "\"b c\",\"a b\",\"c d\",\"a bc\",\"a a\",\"\\u0120 a\",\"aa a\",\"e f\",\"d ef\"";
    static const char pairs[] =
        "[\"b\",\"c\"],[\"a\",\"b\"],[\"c\",\"d\"],[\"a\",\"bc\"],"
        "[\"a\",\"a\"],[\"\\u0120\",\"a\"],[\"aa\",\"a\"],[\"e\",\"f\"],[\"d\",\"ef\"]";
    static const char *const names[] = {"merges written as \"a b\"",
                                        "merges written as [\"a\", \"b\"]"};
    for (int i = 0; i < 2; i++) {
        test_begin(names[i]);
        Tokenizer *t = load_small(vocab, i ? pairs : strings, "false", "");
        check_text(t, "abc", true, "258"); // b c comes before a b in the list
        check_text(t, "ab", true, "256");
        check_text(t, "bcd", true, "257 100"); // and before c d, which is then no pair
        check_text(t, "abcd", true, "258 100");
        check_text(t, "bcdef", true, "257 265"); // the c d that was possible leaves no trace
        check_text(t, "aaaa", true, "259 259");  // leftmost first: aa a a, aa aa
        check_text(t, "aaaaa", true, "259 263"); // aa aa a, then aa a
        check_text(t, " ab", true, "32 256");    // a b comes before space a
        check_text(t, " aa", true, "32 259");
        check_text(t, " a", true, "261");
        check_text(t, "xyz", true, "120 121 122"); // a token that no merge makes
        check_text(t, "", true, "");
        tokenizer_free(t);
    }

    test_begin("ignore_merges takes whole pre-tokens from the vocabulary");
    Tokenizer *t = load_small(vocab, strings, "true", "");
    check_text(t, "xyz", true, "262");
    check_text(t, "xyzx", true, "120 121 122 120");
    check_text(t, "bcd", true, "257 100");
    check_text(t, "xyz1aaa", true, "262 49 263");
    tokenizer_free(t);

    test_begin("1 MB of one letter merges to the longest tokens");
    char *longer = NULL, *merges = NULL;
    size_t unused;
    FILE *v = open_memstream(&longer, &unused), *m = open_memstream(&merges, &unused);
    char a[1025];
    memset(a, 'a', sizeof a);
    for (int n = 1, id = 256; n <= 512; n *= 2, id++) {
        fprintf(v, ",\"%.*s\":%d", 2 * n, a, id);
        fprintf(m, "%s\"%.*s %.*s\"", n > 1 ? "," : "", n, a, n, a);
    }
    fclose(v);
    fclose(m);
    t = load_small(longer, merges, "true", "");
    char *text = malloc(1 << 20);
    memset(text, 'a', 1 << 20);
    int ids[1024];
    for (int i = 0; i < 1024; i++) ids[i] = 256 + 9; // a thousand times the last, 1024 letters
    check_ids(t, text, 1 << 20, true, ids, 1024);
    check_ids(t, text, (1 << 20) - 1024, true, ids, 1023);
    tokenizer_free(t);
    free(text);
    free(longer);
    free(merges);
}

enum { LETTERS = 52, COLLIDING = 200000 };

/* Words of letters are numbers of 52 digits; those of 1 to 3 letters are tokens in this order. */
static int word_id(int word, int letters) {
    if (letters == 1) return word < 26 ? 'a' + word : 'A' + word - 26;
    return letters == 2 ? 256 + word : 256 + LETTERS * LETTERS + word;
}

/* word's letters, in one of four places that take turns. */
static const char *word_text(int word, int letters) {
    static char text[4][5];
    static int turn;
    char *t = text[turn++ % 4];
    t[letters] = 0;
    for (int i = letters - 1; i >= 0; i--, word /= LETTERS) t[i] = (char)word_id(word % LETTERS, 1);
    return t;
}

/* Merges of 1 + 3, 2 + 2 and 3 + 1 letters whose pairs of ids, hashed by a product that everybody
 * knows, all fall into one hundredth of a table of half a million slots, one behind the other. */
static char *colliding_json(void) {
    enum { TWO = LETTERS * LETTERS, THREE = LETTERS * TWO, FOUR = LETTERS * THREE };
    char *vocab = NULL, *merges = NULL, *made = allocate(FOUR, 1);
    size_t unused;
    FILE *v = open_memstream(&vocab, &unused), *m = open_memstream(&merges, &unused);
    for (int letters = 2; letters <= 3; letters++)
        for (int w = 0; w < (letters == 2 ? TWO : THREE); w++)
            fprintf(v, ",\"%s\":%d", word_text(w, letters), word_id(w, letters));
    int n = 0, id = word_id(THREE, 3);
    for (int letters = 1, right = THREE; letters <= 3; letters++, right /= LETTERS) // in `left`
        for (int w = 0; w < FOUR && n < COLLIDING; w++) {
            uint64_t pair = (uint64_t)word_id(w / right, letters) << 32 |
                            (uint64_t)word_id(w % right, 4 - letters);
            if (pair * 0x9e3779b97f4a7c15 >> 45 >= (1 << 19) / 100) continue;
            fprintf(m, n++ ? ",\"%s %s\"" : "\"%s %s\"", word_text(w / right, letters),
                    word_text(w % right, 4 - letters));
            if (!made[w]) fprintf(v, ",\"%s\":%d", word_text(w, 4), id++);
            made[w] = 1;
        }
    fclose(v);
    fclose(m);
    check(n == COLLIDING, "only %d merges collide", n);
    char *json = small_json(vocab, merges, "false", "");
    free(vocab);
    free(merges);
    free(made);
    return json;
}

/* Ends with a refusal, in one line, where dies() expects one. */
static void load_colliding(void *json) {
    struct rlimit limit = {12, 12}; // seconds of processor time; it needs half a one
    setrlimit(RLIMIT_CPU, &limit);
    Tokenizer *t = tokenizer_load("colliding", json, strlen(json));
    die("%d tokens", tokenizer_size(t));
}

static void test_colliding(void) {
    test_begin("200,000 merges made to collide are loaded in linear time");
    char *json = colliding_json(), message[200] = "";
    check(dies(load_colliding, json, message, sizeof message) && strstr(message, " tokens"),
          "it did not load: %s", message);
    free(json);
}

static void test_added(void) {
    test_begin("added tokens are cut out, the longest first");
    Tokenizer *t = load_small(",\"fo\":256", "\"f o\"", "true",
                              "{\"id\":257,\"content\":\"<x>\",\"special\":true},"
                              "{\"id\":258,\"content\":\"<x>y\",\"special\":true},"
                              "{\"id\":259,\"content\":\"foo\",\"normalized\":true},"
                              "{\"id\":260,\"content\":\"oo<\",\"normalized\":true},"
                              "{\"id\":261,\"content\":\">z\"},{\"id\":262,\"content\":\" é\"}");
    check(tokenizer_size(t) == 263, "size %d", tokenizer_size(t));
    check_text(t, "a<x>b<x>y<x", true, "97 257 98 258 60 120");
    check_text(t, "<x><x>yfo", true, "257 258 256");
    check_text(t, "foo<x>", true, "259 257");
    check_text(t, "ooo<x>", true, "111 111 111 257"); // oo< is normalized: <x> is cut out before
    check_text(t, "ooo<", true, "111 260");
    check_text(t, "foo<y", true, "259 60 121"); // leftmost first
    check_text(t, "a>z é", true, "97 261 262");
    check_text(t, "<x>z", true, "257 122");
    check_text(t, " <x>  <x>", true, "32 257 32 32 257"); // white space ends with the piece

    test_begin("without `special` only special tokens are plain text");
    check_text(t, "<x>foo<x>y", false, "60 120 62 259 60 120 62 121");
    check_text(t, "<x>z>z", false, "60 120 62 122 261"); // as there, <x> hides the first >z

    test_begin("decoding: special tokens give nothing, other added tokens their text");
    size_t n;
    tokenizer_decode(t, 257, &n);
    check(n == 0, "a special token decodes to %zu bytes", n);
    const char *s = tokenizer_decode(t, 262, &n);
    check(n == 3 && !memcmp(s, " é", 3), "an added token decodes to %.*s", (int)n, s);
    s = tokenizer_decode(t, 256, &n);
    check(n == 2 && !memcmp(s, "fo", 2), "a token decodes to %.*s", (int)n, s);
    static const int none[] = {-1, 263, INT_MAX, INT_MIN};
    for (int i = 0; i < 4; i++) {
        s = tokenizer_decode(t, none[i], &n);
        check(s && n == 0, "id %d decodes to %zu bytes", none[i], n);
    }

    test_begin("ids by text");
    check(tokenizer_id(t, "<x>y") == 258, "<x>y is %d", tokenizer_id(t, "<x>y"));
    check(tokenizer_id(t, " é") == 262, " é is %d", tokenizer_id(t, " é"));
    check(tokenizer_id(t, "fo") == 256, "fo is %d", tokenizer_id(t, "fo"));
    check(tokenizer_id(t, "Ġ") == ' ', "Ġ is %d", tokenizer_id(t, "Ġ"));
    check(tokenizer_id(t, "ł") == 0xa0, "ł is %d", tokenizer_id(t, "ł"));
    check(tokenizer_id(t, "Ń") == 0xad, "Ń is %d", tokenizer_id(t, "Ń"));
    static const char *const unknown[] = {"", " ", "<x", "fooo", "日", "\xff"};
    for (int i = 0; i < 6; i++)
        check(tokenizer_id(t, unknown[i]) == -1, "\"%s\" has an id", unknown[i]);
    tokenizer_free(t);
}

/* What the tokenizers library makes of the same, as fine-tunes have it. */
static void test_fine_tunes(void) {
    test_begin(
        "added tokens with lstrip, rstrip, and of the vocabulary; ids as tokenizers gives them");
    Tokenizer *t = load_small(",\"ab\":256", "\"a b\"", "false",
                              "{\"id\":257,\"content\":\"<l>\",\"lstrip\":true,\"special\":true},"
                              "{\"id\":258,\"content\":\"<r>\",\"rstrip\":true},"
                              "{\"id\":256,\"content\":\"ab\"},"
                              "{\"id\":259,\"content\":\"<b>\",\"lstrip\":true,\"rstrip\":true,"
                              "\"normalized\":true}");
    check_text(t, "x \u00a0\n<l> <l>x", true, "120 257 257 120");
    check_text(t, "x <r> \u3000\t<r>  x", true, "120 32 258 258 120");
    check_text(t, "<r> <l> x", true, "258 257 32 120");
    check_text(t, "x <b> <b> x", true, "120 259 259 120");
    check_text(t, "<l>", true, "257");
    check_text(t, " <l> x", false, "32 60 108 62 32 120"); // plain text keeps its spaces
    check_text(t, "xab", true, "120 256");
    tokenizer_free(t);

    test_begin("holes among ids, a token there twice, fields without effect");
    char *text = small_json(",\"b\":300,\"ab\":400", "\"a b\"", "false",
                            "{\"id\":257,\"content\":\"<x>\",\"special\":true}");
    static const char *const fields[][2] = {{"\"dropout\":null", "\"dropout\":0.0 "},
                                            {"\"normalizer\":null",
                                             "\"normalizer\":{\"type\":\"Sequence\","
                                             "\"normalizers\":[]}"}};
    for (int i = 0; i < 2; i++) {
        char *at = strstr(text, fields[i][0]), *changed;
        if (!check(at != NULL, "no %s", fields[i][0])) return;
        char *end = at + strlen(fields[i][0]);
        changed = format_text("%.*s%s%s", (int)(at - text), text, fields[i][1], end);
        free(text);
        text = changed;
    }
    t = tokenizer_load("holes", text, strlen(text));
    free(text);
    size_t n;
    check_text(t, "xb<x>ab", true, "120 300 257 400");
    check(*tokenizer_decode(t, 98, &n) == 0 && n == 0, "the first b still decodes");
    check(tokenizer_size(t) == 401, "size %d", tokenizer_size(t));
    tokenizer_free(t);
}

/* ---- there and back ------------------------------------------------------------------------- */

static void check_round_trip(const Tokenizer *t, const char *what, const char *text, size_t n) {
    int count;
    int *ids = tokenizer_encode(t, text, n, false, &count);
    size_t at = 0, length;
    bool same = true;
    for (int i = 0; same && i < count; i++) {
        const char *s = tokenizer_decode(t, ids[i], &length);
        same = length > 0 && at + length <= n && !memcmp(text + at, s, length);
        at += length;
    }
    check(same && at == n, "%s, %zu bytes, differs before byte %zu", what, n, at);
    free(ids);
}

/* Random text: bytes of any kind, runs of one, UTF-8 whole and cut, special tokens. */
static size_t random_text(uint64_t *seed, char *text, size_t most) {
    static const char *const parts[] = {"é",          "日本",  "🙂", "\xe2\x82",
                                        "\xf0\x9f",   "'s",    "\r\n", "  ",
                                        "<|eot_id|>", "12345", " the", "\xc2\x85"};
    size_t n = 0;
    while (n + 16 < most && random_float(seed) < 0.9f) {
        float choice = random_float(seed);
        int r = (int)((random_float(seed) + 1) * 128) & 255;
        if (choice < -0.3f) {
            text[n++] = (char)r;
        } else if (choice < 0) {
            memset(text + n, r, 1 + r % 9);
            n += 1 + r % 9;
        } else {
            n = stpcpy(text + n, parts[r % 12]) - text;
        }
    }
    return n;
}

static void test_round_trips(const char *path, const char *name) {
    test_begin(name);
    if (!exists(path)) {
        test_skip("its tokenizer.json is not there");
        return;
    }
    Tokenizer *t = load_file(path);
    char all[512];
    for (int i = 0; i < 256; i++) {
        all[i] = (char)i;
        all[511 - i] = (char)i;
        check_round_trip(t, "a single byte", &all[i], 1);
    }
    check_round_trip(t, "every byte", all, sizeof all);
    check_round_trip(t, "nothing", all, 0);
    check_round_trip(t, "NULs", "\0\0a\0 \0\n\0", 8);

    uint64_t seed = 1;
    for (int i = 0; i < 2000; i++) {
        char text[256];
        check_round_trip(t, "random text", text, random_text(&seed, text, sizeof text));
    }
    static const char *const units[] = {"a",        " ", "\n", "ab", "\xff",
                                        "\xe2\x82", "é", ".",  "<",  "\r\n "};
    size_t n = 1000000;
    char *text = malloc(n);
    for (int i = 0; i < 10; i++) {
        for (size_t j = 0; j < n; j++) text[j] = units[i][j % strlen(units[i])];
        check_round_trip(t, units[i], text, n);
    }
    free(text);
    tokenizer_free(t);
}

/* ---- utf8_write() --------------------------------------------------------------------------- */

/* Writes `text` in two parts and checks how much of it is out after each. */
static void check_stream(const char *text, size_t n, size_t cut, size_t out_at_cut, bool flush) {
    char *out;
    size_t n_out;
    FILE *f = open_memstream(&out, &n_out);
    Utf8Stream s = {0};
    utf8_write(&s, text, cut, flush, f);
    fflush(f);
    check(n_out == out_at_cut, "%zu bytes of %zu are out, not %zu", n_out, cut, out_at_cut);
    utf8_write(&s, text + cut, n - cut, true, f);
    fclose(f);
    check(n_out == n && !memcmp(out, text, n), "the text cut at %zu came out otherwise", cut);
    free(out);
}

static void test_stream(void) {
    test_begin("streamed text is cut between characters");
    static const char text[] = "aé€🙂z"; // 1, 2, 3, 4, 1 bytes
    static const size_t whole[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11};
    for (size_t cut = 0; cut < sizeof whole / sizeof *whole; cut++) {
        check_stream(text, 11, cut, whole[cut], false);
        check_stream(text, 11, cut, cut, true);
    }
    test_begin("streamed bytes that are no UTF-8 pass");
    check_stream("\xe2\x82"
                 "A",
                 3, 3, 3, false); // what waits goes out before another character
    check_stream("\xe2\xc3\xa9", 3, 2, 1, false);
    check_stream("\xff\x80\xc0\xf8", 4, 4, 4, false);
    check_stream("\xf0\x9f\x99", 3, 3, 0, false);
    check_stream("\xed\xa0\x80\xf4\xbf\xbf\xbf", 7, 7, 7, false);

    char *out;
    size_t n_out;
    FILE *f = open_memstream(&out, &n_out);
    Utf8Stream s = {0};
    for (int i = 0; i < 11; i++) utf8_write(&s, text + i, 1, false, f);
    fclose(f);
    check(n_out == 11 && !memcmp(out, text, 11) && s.n_pending == 0, "byte by byte: %zu", n_out);
    free(out);
}

/* ---- broken files --------------------------------------------------------------------------- */

typedef struct {
    const char *text;
    size_t bytes;
} Text;

/* Loads a file; one that can be loaded ends the process too, so that dies() tells a crash. */
static void load_and_die(void *arg) {
    const Text *text = arg;
    tokenizer_free(tokenizer_load("broken.json", text->text, text->bytes));
    die("loaded");
}

/* A good file in which the first `from` becomes `to` must be refused with `says`. */
typedef struct {
    const char *name, *from, *to, *says;
} Broken;

static const Broken broken[] = {
    {"no JSON", "{\"added", "{added", "JSON"},
    {"an empty list", "{", "[] {", "JSON"},
    {"no model", "\"model\"", "\"modal\"", "\"model\" is missing"},
    {"a model that is no object", "\"model\":{", "\"model\":[],\"x\":{", "\"model\" is an array"},
    {"another model type", "\"BPE\"", "\"WordPiece\"", "model.type is WordPiece"},
    {"a model type on two lines", "\"BPE\"", "\"B\\nPE\"", "model.type is B?PE"},
    {"no vocabulary", "\"vocab\"", "\"vocap\"", "\"vocab\" is missing"},
    {"a vocabulary that is no object", "\"vocab\":{", "\"vocab\":7,\"x\":{", "expected an object"},
    {"an empty vocabulary", "\"vocab\":{", "\"vocab\":{},\"x\":{", "byte 0x00"},
    {"no merges", "\"merges\"", "\"merges2\"", "\"merges\" is missing"},
    {"merges that are no array", "\"merges\":[", "\"merges\":{},\"x\":[", "expected an array"},
    {"dropout", "\"dropout\":null", "\"dropout\":0.1", "dropout"},
    {"a prefix of subwords", "\"dropout\":null", "\"continuing_subword_prefix\":\"##\"", "prefix"},
    {"the prefix null", "\"dropout\":null", "\"continuing_subword_prefix\":\"null\"", "prefix"},
    {"a suffix of words", "\"dropout\":null", "\"end_of_word_suffix\":\"</w>\"", "suffix"},
    {"ignore_merges that is no bool", "_merges\":false", "_merges\":\"false\"", "ignore_merges"},

    {"a merge of an unknown left token", "\"a b\"", "\"xy z\"", "model.merges[0] is xy z"},
    {"a merge of an unknown right token", "\"ab c\"", "\"x yz\"", "model.merges[1] is x yz"},
    {"a merge into an unknown token", "\"a b\"", "\"b a\"", "model.merges[0]"},
    {"a merge without a space", "\"a b\"", "\"ab\"", "model.merges[0]"},
    {"a merge with two spaces", "\"a b\"", "\"a  b\"", "model.merges[0]"},
    {"a merge of three", "\"a b\"", "[\"a\",\"b\",\"c\"]", "model.merges[0] is an array"},
    {"a merge of one", "\"a b\"", "[\"ab\"]", "model.merges[0] is an array"},
    {"a merge of none", "\"a b\"", "[]", "model.merges[0] is an array"},
    {"a merge of numbers", "\"a b\"", "[1,2]", "model.merges[0] is an array"},
    {"a merge of a token and a number", "\"a b\"", "[\"a\",1]", "model.merges[0] is an array"},
    {"a merge that is an object", "\"a b\"", "{\"a\":\"b\",\"b\":\"c\"}", "is an object"},
    {"a merge that is a number", "\"a b\"", "7", "model.merges[0] is a number"},
    {"a merge outside the byte alphabet", "\"a b\"", "\"a 日\"", "model.merges[0]"},

    {"an id below 0", "\"ab\":256", "\"ab\":-1", "the id of token ab"},
    {"an id that is no integer", "\"ab\":256", "\"ab\":256.5", "ab is no integer"},
    {"an id beyond all", "\"ab\":256", "\"ab\":16777216", "integer in 0..16777215"},
    {"an absurd id", "\"ab\":256", "\"ab\":1e300", "the id of token ab"},
    {"an id beyond double", "\"ab\":256", "\"ab\":1e999", "the id of token ab"},
    {"an id that is no number", "\"ab\":256", "\"ab\":\"256\"", "the id of token ab"},
    {"an id that is null", "\"ab\":256", "\"ab\":null", "the id of token ab"},
    {"an id twice", "\"ab\":256", "\"ab\":97", "the id of token ab, 97"},
    {"a byte without a token", "\"b\":98", "\"bq\":98", "byte 0x62"},
    {"a token with a space", "\"ab\":256", "\"a b\":256", "token a b of model.vocab"},
    {"a token outside the byte alphabet", "\"ab\":256", "\"日\":256", "token 日 of model.vocab"},
    {"a token with a soft hyphen", "\"ab\":256", "\"a\\u00ad\":256", "stands for no byte"},
    {"a token that is no UTF-8", "\"ab\":256", "\"a\xff\":256", "not valid JSON"},

    {"a normalizer", "izer\":null", "izer\":{\"type\":\"NFC\"}", "\"normalizer\" is an object"},
    {"no pre-tokenizer", "\"pre_tokenizer\"", "\"x\"", "\"pre_tokenizer\" is missing"},
    {"another pre-tokenizer", "\"Sequence\"", "\"Metaspace\"", "pre_tokenizer.type is Metaspace"},
    {"no pre-tokenizers", "\"pretokenizers\"", "\"x\"", "\"pretokenizers\" is missing"},
    {"three pre-tokenizers", "[{\"type\":\"Split\"", "[{},{\"type\":\"Split\"", "not two"},
    {"another first pre-tokenizer", "\"Split\"", "\"Digits\"", "pretokenizers[0].type is Digits"},
    {"another second pre-tokenizer", "\"ByteLevel\"", "\"Digits\"", "pretokenizers[1].type"},
    {"another split pattern", "{1,3}", "{1,2}", "Split.pattern.Regex is (?i:'s|'t"},
    {"a split by a string", "\"Regex\"", "\"String\"", "Split.pattern.Regex is missing"},
    {"another split behavior", "\"Isolated\"", "\"Removed\"", "Split.behavior is Removed"},
    {"an inverted split", "\"invert\":false", "\"invert\":true", "invert"},
    {"a prefix space", "_space\":false", "_space\":true", "add_prefix_space"},
    {"a second split", "\"use_regex\":false", "\"use_regex\":true", "use_regex"},
    {"a second split by default", ",\"use_regex\":false", "", "use_regex"},

    {"an added token of single words", "\"id\":259", "\"id\":259,\"single_word\":true",
     "single_word"},
    {"an added token without content", "\"content\":", "\"x\":", "\"content\" is missing"},
    {"an added token with no text", "\"<x>\"", "\"\"", "0 bytes"},
    {"an added token that is no object", "{\"id\":260,\"content\":\"<y>\"}", "7", "\"content\" is"},
    {"an added token without an id", "\"id\":259,", "", "the id of token <x>"},
    {"an added token with a used id", "\"id\":259", "\"id\":0",
     "<x> has the id 0, transformers gives it 259"},
    {"an added token twice", "\"<y>\"", "\"<x>\"", "the same content"},
    {"an added token of the vocabulary", "\"<y>\"", "\"ab\"",
     "ab has the id 260, transformers gives it 256"},
    {"an added token that is perhaps special", "\"special\":true", "\"special\":1",
     "\"special\" is"},
};

static void check_refused(const char *json, size_t bytes, const char *says) {
    count_bad_input("tokenizer.json");
    char message[1024];
    bool ended = dies(load_and_die, &(Text){json, bytes}, message, sizeof message);
    check(ended, "did not end with one line: %s", message);
    check(strstr(message, "broken.json") && strstr(message, says), "it says %s", message);
}

static void test_broken(void) {
    char *good = small_json(",\"ab\":256,\"abc\":257,\"xyz\":258", "\"a b\",\"ab c\"", "false",
                            "{\"id\":259,\"content\":\"<x>\",\"special\":true},"
                            "{\"id\":260,\"content\":\"<y>\"}");
    size_t bytes = strlen(good);
    test_begin("the good file that the broken ones are made of");
    tokenizer_free(tokenizer_load("good", good, bytes));

    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        const Broken *b = &broken[i];
        test_begin(b->name);
        const char *from = strstr(good, b->from);
        if (!check(from, "%s is not in the good file", b->from)) continue;
        char *bad;
        if (asprintf(&bad, "%.*s%s%s", (int)(from - good), good, b->to, from + strlen(b->from)) < 0)
            die("out of memory");
        check_refused(bad, strlen(bad), b->says);
        free(bad);
    }

    test_begin("an added token of 513 bytes");
    char added[600];
    snprintf(added, sizeof added, "{\"id\":256,\"content\":\"%0*d\"}", 513, 7);
    char *bad = small_json("", "", "false", added);
    check_refused(bad, strlen(bad), "513 bytes long, expected 1 to 512");
    free(bad);

    test_begin("an empty tokenizer.json, and a cut one");
    check_refused(good, 0, "JSON");
    for (size_t n = 1; n < bytes; n += bytes / 60) check_refused(good, n, "broken.json");

    test_begin("tokenizer.json with random bytes changed");
    uint64_t seed = 2;
    for (int i = 0; i < 200; i++) {
        char *changed = strdup(good), message[1024];
        for (int j = 0; j <= i % 3; j++)
            changed[(size_t)((random_float(&seed) + 1) / 2 * bytes)] =
                "\"{}[]:,\\019aet -.\xff"[(int)((random_float(&seed) + 1) * 9)];
        count_bad_input("bytes of tokenizer.json changed at random");
        bool ended = dies(load_and_die, &(Text){changed, bytes}, message, sizeof message);
        check(ended, "change %d: did not end with one line: %s", i, message);
        free(changed);
    }
    free(good);
}

void test_tokenizer(void) {
    test_begin("cases of the tiny tokenizer");
    check_cases(TINY, TINY_CASES);
    test_begin("cases of LLaMA 3.1's tokenizer");
    if (exists(REAL) && exists(REAL_CASES)) check_cases(REAL, REAL_CASES);
    else test_skip("../shared/llama3.1 is not there");

    test_begin("special tokens as text");
    Tokenizer *t = load_file(TINY);
    check(tokenizer_size(t) == 4096, "size %d", tokenizer_size(t));
    int eot = tokenizer_id(t, "<|eot_id|>");
    check(eot == 3849, "<|eot_id|> is %d", eot);
    check_text(t, "hi<|eot_id|>", true, "71 72 3849");
    check_text(t, "hi<|eot_id|", true, "71 72 27 91 68 306 62 298 91");
    check_text(t, "hi<|eot_id|>", false, "71 72 27 91 68 306 62 298 91 29");
    tokenizer_free(t);

    test_begin("the split pattern");
    for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) check_split(splits[i]);
    test_fine_tunes();
    test_merging();
    test_colliding();
    test_added();
    test_round_trips(TINY, "any bytes there and back, tiny");
    test_round_trips(REAL, "any bytes there and back, LLaMA 3.1");
    test_stream();
    test_broken();
}
