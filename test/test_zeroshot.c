/* ./run -z: golden log-likelihoods of lm_eval, and the counts that follow from them. A golden line
 * is an item with what lm_eval found for it, keys that ./run passes over. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "test.h"

#define SCRATCH "build/test/zeroshot"
enum { MOST_ITEMS = 64, MOST_CHOICES = 8 };

/* What a golden line says, and what ./run -o found. */
typedef struct {
    char *context, *choices[MOST_CHOICES];
    double golden[MOST_CHOICES], found[MOST_CHOICES];
    int n, gold;
    bool greedy;
} Answer;

static int numbers(const Json *json, const char *key, double *x) {
    int n = 0, node = json_get(json, 0, key);
    for (int i = json_first(json, node); i >= 0 && n < MOST_CHOICES; i = json_next(json, node, i))
        json_number(json, i, &x[n++]);
    return n;
}

static int code_points(const char *s) {
    int n = 0;
    for (; *s; s++) n += (*s & 0xc0) != 0x80;
    return n;
}

/* The lines of a golden file, and of ./run's output beside it. Returns how many. */
static int read_answers(const char *golden, const char *found, Answer *answers) {
    size_t bytes;
    char *file = read_file(golden, &bytes), *out = read_file(found, &bytes), *more_g, *more_f;
    int n = 0;
    char *g = file ? strtok_r(file, "\n", &more_g) : NULL;
    char *f = out ? strtok_r(out, "\n", &more_f) : NULL;
    for (; g && f && n < MOST_ITEMS; n++) {
        Answer *a = &answers[n];
        *a = (Answer){0};
        Json *json = json_parse(golden, g, strlen(g)), *line = json_parse(found, f, strlen(f));
        a->n = numbers(json, "loglikelihoods", a->golden);
        check(numbers(line, "loglikelihoods", a->found) == a->n, "item %d: %s", n, f);
        double gold = -1;
        json_number(json, json_get(json, 0, "gold"), &gold);
        a->gold = (int)gold;
        int list = json_get(json, 0, "choices"), k = 0;
        for (int i = json_first(json, list); i >= 0; i = json_next(json, list, i))
            a->choices[k++] = json_string(json, i, &bytes);
        int context = json_get(json, 0, "context");
        a->context = json_type(json, context) == '"' ? json_string(json, context, &bytes) : NULL;
        a->greedy = json_is(json, json_first(json, json_get(json, 0, "greedy")), "true");
        json_free(json);
        json_free(line);
        g = strtok_r(NULL, "\n", &more_g);
        f = strtok_r(NULL, "\n", &more_f);
    }
    check(!g && !f && n > 0, "%s and %s have not the same number of lines", golden, found);
    free(file);
    free(out);
    return n;
}

static void free_answers(Answer *answers, int n) {
    for (int i = 0; i < n; i++) {
        free(answers[i].context);
        for (int k = 0; k < MOST_CHOICES; k++) free(answers[i].choices[k]);
    }
}

/* The lines that ./run -z prints for a count of n. */
static char *count_line(char *to, const char *name, double mean, int n) {
    return to + sprintf(to, "%s %.4f (%d items), standard error %.4f\n", name, mean, n,
                        sqrt(mean * (1 - mean) / (n - 1)));
}

/* ./run -z on a golden file: each log-likelihood, then acc and, for choices, acc_norm. */
static void check_golden(const char *model, const char *golden, bool norm) {
    check(shell("./run %s -d cpu -z %s -o " SCRATCH ".out 2>/dev/null", model, golden) == 0, "%s",
          output);
    Answer *answers = allocate(MOST_ITEMS, sizeof *answers);
    int n = read_answers(golden, SCRATCH ".out", answers), right = 0, right_norm = 0;
    double off = 0;
    for (int i = 0; i < n; i++) {
        const Answer *a = &answers[i];
        int best = 0, best_norm = 0;
        for (int k = 0; k < a->n; k++) {
            off = fmax(off, fabs(a->golden[k] - a->found[k]));
            if (a->golden[k] > a->golden[best]) best = k;
            if (norm && a->golden[k] / code_points(a->choices[k]) >
                            a->golden[best_norm] / code_points(a->choices[best_norm]))
                best_norm = k;
        }
        right += best == a->gold;
        right_norm += best_norm == a->gold;
    }
    printf("     %s, %d items: off by at most %.6f\n", golden, n, off);
    check(off < 1e-3, "a log-likelihood is off by %g", off);
    char expected[300], *p = count_line(expected, "acc", (double)right / n, n);
    if (norm) count_line(p, "acc_norm", (double)right_norm / n, n);
    check(!strcmp(output, expected), "expected %s, got %s", expected, output);
    free_answers(answers, n);
    free(answers);
}

/* The other two kinds, from golden choices: no gold, as LAMBADA's; gold for each, as MC2's. */
static void test_other_kinds(void) {
    test_begin("zero-shot: greedy accuracy and perplexity without gold, mass with several right");
    shell("./run data/tiny -d cpu -z test/data/zeroshot_choices.jsonl -o " SCRATCH ".out");
    Answer *answers = allocate(MOST_ITEMS, sizeof *answers);
    int n = read_answers("test/data/zeroshot_choices.jsonl", SCRATCH ".out", answers), greedy = 0;
    FILE *last = fopen(SCRATCH "_last.jsonl", "w"), *mc2 = fopen(SCRATCH "_mc2.jsonl", "w");
    double sum = 0, mass = 0;
    for (int i = 0; i < n; i++) {
        const Answer *a = &answers[i];
        double all = 0, right = 0;
        fprintf(last, "{\"context\": ");
        put_json_string(last, a->context);
        fprintf(last, ", \"choices\": [");
        put_json_string(last, a->choices[0]);
        fprintf(last, "]}\n\n");
        fprintf(mc2, "{\"context\": ");
        put_json_string(mc2, a->context);
        for (int k = 0; k < a->n; k++) {
            fprintf(mc2, k ? ", " : ", \"choices\": [");
            put_json_string(mc2, a->choices[k]);
            all += exp(a->golden[k]);
            right += k != 1 ? exp(a->golden[k]) : 0;
        }
        for (int k = 0; k < a->n; k++) fprintf(mc2, k ? ", %d" : "], \"gold\": [%d", k != 1);
        fprintf(mc2, "]}\n");
        sum += a->golden[0];
        mass += right / all;
        greedy += a->greedy;
    }
    fclose(last);
    fclose(mc2);
    double acc, ppl;
    check(shell("./run data/tiny -d cpu -z " SCRATCH "_last.jsonl 2>/dev/null") == 0 &&
              sscanf(output, "acc %lf (%*d items), standard error %*f\nperplexity %lf", &acc,
                     &ppl) == 2 &&
              fabs(acc - (double)greedy / n) < 1e-4 && fabs(ppl / exp(-sum / n) - 1) < 1e-4,
          "expected %f, %f: %s", (double)greedy / n, exp(-sum / n), output);
    check(shell("./run data/tiny -d cpu -z " SCRATCH "_mc2.jsonl 2>/dev/null") == 0 &&
              sscanf(output, "mc2 %lf (%*d items), standard error ", &acc) == 1 &&
              fabs(acc - mass / n) < 1e-4,
          "expected %f: %s", mass / n, output);
    free_answers(answers, n);
    free(answers);

    test_begin("zero-shot: a word that the model would say, and spaces at the context's end");
    shell("./run data/tiny -d cpu -t 0 -n 1 -i 'Once upon a' 2>/dev/null"); // " time"
    char *word = strrchr(output, ' ') + 1;
    word[strcspn(word, "\n")] = 0;
    char said[100];
    snprintf(said, sizeof said, "%s", word);
    const char *contexts[] = {"Once upon a", "Once upon a\xe2\x80\x83 \n"};
    for (int i = 0; i < 2; i++) {
        FILE *f = fopen(SCRATCH "_last.jsonl", "w");
        fprintf(f, "{\"context\": ");
        put_json_string(f, contexts[i]);
        fprintf(f, ", \"choices\": [\"%s\"]}", said);
        fclose(f);
        shell("./run data/tiny -d cpu -z " SCRATCH "_last.jsonl 2>/dev/null");
        const char *expected = i ? "acc 0.0000 (1 items)\n" : "acc 1.0000 (1 items)\n";
        check(!strncmp(output, expected, strlen(expected)), "%s: %s", said, output);
    }

    // What is too long loses its beginning: the same as if it had not been there.
    test_begin("zero-shot: a context that is too long loses its beginning");
    char with[300], without[300];
    shell(
        "printf '{\"context\":\"Once upon a time there was a king and a queen\",\"choices\":[\"who "
        "had\"]}' >" SCRATCH "_long.jsonl; ./run data/tiny -d cpu -z " SCRATCH
        "_long.jsonl -l 6 2>/dev/null");
    snprintf(with, sizeof with, "%.299s", output);
    shell("./run data/tiny -d cpu -z " SCRATCH "_long.jsonl -l 600 2>/dev/null");
    snprintf(without, sizeof without, "%.299s", output);
    check(!strncmp(with, "acc ", 4) && strcmp(with, without), "%s%s", with, without);
}

/* Each choice after the other, with both caches. */
static void test_small_caches(void) {
    enum { N = 12 };
    test_begin("zero-shot: a KV cache in 8 bits; the score of a choice after others");
    FILE *f = fopen(SCRATCH "_kv.jsonl", "w");
    for (int i = 0; i < 2 * N; i++) { // two items a context, the choices in either order
        fprintf(f, "{\"context\": \"");
        for (int k = 0; k < 52 + i / 2; k++) fprintf(f, "a king ");
        const char *choices[] = {"and a queen and a daughter", "who had a son"};
        fprintf(f, "\", \"choices\": [\"%s\", \"%s\"], \"gold\": 0}\n", choices[i % 2],
                choices[1 - i % 2]);
    }
    fclose(f);
    double ll[2][2 * N][2];
    for (int i = 0; i < 2; i++) {
        check(shell("./run data/tiny -d cpu -k %d -z " SCRATCH "_kv.jsonl -o " SCRATCH
                    ".out 2>/dev/null",
                    16 >> i) == 0,
              "-k %d: %s", 16 >> i, output);
        size_t bytes;
        char *out = read_file(SCRATCH ".out", &bytes), *line = out;
        for (int item = 0; item < 2 * N && line; item++, line = strchr(line, '\n') + 1) {
            Json *json = json_parse("", line, strcspn(line, "\n"));
            check(numbers(json, "loglikelihoods", ll[i][item]) == 2, "item %d", item);
            json_free(json);
        }
        free(out);
        for (int item = 0; item < 2 * N; item++) {
            double other = ll[i][item ^ 1][1], off = ll[i][item][0] - ll[0][item][0];
            check(fabs(ll[i][item][0] - other) < 1e-4, "-k %d, item %d: %f, after another %f",
                  16 >> i, item, ll[i][item][0], other);
            check(fabs(off) < 0.3, "-k %d, item %d: off by %f", 16 >> i, item, off);
        }
    }
}

static void test_bad_items(void) {
    test_begin("zero-shot: items that are none");
    const struct {
        const char *line, *message;
    } bad[] = {
        {"{\"context\": \"a\", \"choices\": [\"b\"", "line 2: not valid JSON"},
        {"[]", "line 2: not a JSON object"},
        {"{\"choices\": [\"a\", \"b\"], \"gold\": 0}", "line 2: \"context\" is no string"},
        {"{\"context\": \"a\", \"gold\": 0}", "line 2: \"choices\" is no string"},
        {"{\"context\": \"a\", \"choices\": [], \"gold\": 0}",
         "line 2: there is nothing to choose"},
        {"{\"context\": \"a\", \"choices\": [\"b\", 3], \"gold\": 0}", "\"choices\" is no string"},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"\"], \"gold\": 0}", "choice 1 is empty"},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"c\"]}", "2 choices and no \"gold\""},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 2}", "no integer in 0..1"},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": -1}", "no integer in 0..1"},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": \"0\"}",
         "no integer in 0..1"},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": [1]}", "1 entries"},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": [0, 2]}", "0 or 1"},
        {"{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": [0, 0]}", "0 of them 1"},
        {"{\"context\": [\"a\", \"b\"], \"choices\": [\"b\", \"c\"], \"gold\": 0}",
         "several contexts with several choices"},
        {"{\"context\": [\"a\", \"b\"], \"choices\": [\"b\"], \"gold\": 0}", "of another kind"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[400];
        int n = snprintf(text, sizeof text,
                         "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 0}\n%s\n",
                         bad[i].line);
        write_file(SCRATCH "_bad.jsonl", text, n);
        count_bad_input("items given to ./run -z");
        int status = shell("./run data/tiny -d cpu -z " SCRATCH "_bad.jsonl");
        const char *newline = strchr(output, '\n');
        check(status == 1 && !strncmp(output, "error: ", 7) && newline && !newline[1] &&
                  strstr(output, bad[i].message) && strstr(output, ", line 2: "),
              "%s: status %d: %s", bad[i].line, status, output);
    }
    write_file(SCRATCH "_bad.jsonl", "\n \n", 3);
    check(shell("./run data/tiny -z " SCRATCH "_bad.jsonl") == 1 && strstr(output, "no items"),
          "%s", output);
    shell("printf '{\"context\": \"a\", \"choices\": [\"one two three four five\"]}' >" SCRATCH
          "_bad.jsonl");
    check(shell("./run data/tiny -d cpu -l 2 -z " SCRATCH "_bad.jsonl") == 1 &&
              strstr(output, "line 1: a choice of 5 tokens, expected 1 to 2"),
          "%s", output);
    const char *own[] = {SCRATCH "_bad.jsonl", SCRATCH "_model/config.json",
                         SCRATCH "_model/notes"};
    shell("rm -rf " SCRATCH "_model && cp -rL data/tiny " SCRATCH "_model && echo x >" SCRATCH
          "_model/notes && cp test/data/zeroshot_choices.jsonl " SCRATCH "_bad.jsonl");
    for (int i = 0; i < 3; i++) {
        count_bad_input("items given to ./run -z");
        check(shell("cp %s " SCRATCH "_kept && ./run " SCRATCH "_model -d cpu -z " SCRATCH
                    "_bad.jsonl -o %s",
                    own[i], own[i]) == 1 &&
                  strstr(output, i ? "it is a file of MODEL" : "it is the file of -z"),
              "%s: %s", own[i], output);
        check(shell("cmp " SCRATCH "_kept %s", own[i]) == 0, "%s was overwritten", own[i]);
    }
    const char *places[] = {SCRATCH "_kept", "no/where", "/dev/null"},
               *says[] = {"line 1: a choice of 5 tokens", "no/where: cannot be written",
                          "/dev/null: cannot be"};
    shell("echo old >" SCRATCH
          "_kept && printf '{\"context\": \"a\", \"choices\": [\"one two three "
          "four five\"]}' >" SCRATCH "_bad.jsonl");
    for (int i = 0; i < 3; i++) {
        count_bad_input("items given to ./run -z");
        check(shell("./run data/tiny -d cpu -l 2 -z " SCRATCH "_bad.jsonl -o %s", places[i]) == 1 &&
                  strstr(output, says[i]),
              "%s: %s", places[i], output);
    }
    check(shell("test \"$(cat " SCRATCH "_kept*)\" = old") == 0, "a part was written");
    check(shell("./run data/tiny -z x -o ''") == 2 && strstr(output, "-o: the name"), "%s", output);
    check(shell("./run data/tiny -o x") == 2 && strstr(output, "-o: only with -z"), "%s", output);
}

void test_zeroshot(void) {
    test_begin("zero-shot: lm_eval's log-likelihoods, acc and acc_norm");
    check_golden("data/tiny", "test/data/zeroshot_choices.jsonl", true);
    check_golden("data/tiny", "test/data/zeroshot_contexts.jsonl", false);
    test_begin("zero-shot: the same if the context holds no more than the longest item");
    check_golden("data/tiny -l 42", "test/data/zeroshot_choices.jsonl", true);
    test_other_kinds();
    test_small_caches();
    test_bad_items();
}

/* All items of ../shared/zeroshot, on both models. */
void test_zeroshot_slow(void) {
    static const char *const tasks[] = {"piqa", "hellaswag", "arc", "winogrande"};
    static const char *const models[][2] = {{"tiny", "data/tiny"},
                                            {"small", "../shared/models/small"}};
    for (int m = 0; m < 2; m++)
        for (int t = 0; t < 4; t++) {
            char name[100], path[100];
            snprintf(name, sizeof name, "zero-shot: %s, %s", models[m][0], tasks[t]);
            snprintf(path, sizeof path, "../shared/zeroshot/%s-%s.json", tasks[t], models[m][0]);
            test_begin(name);
            if (!exists(path) || !exists(models[m][1])) {
                test_skip("../shared is not there");
                continue;
            }
            // An item a line between the lines of the file's head and its end.
            shell("grep '^{\"context\"' %s | sed 's/,$//' >" SCRATCH "_golden.jsonl", path);
            check_golden(models[m][1], SCRATCH "_golden.jsonl", t < 3);
        }
}
