/* The ids that a chat feeds, against those of the templates in LLaMA 3.1's and Llama 3's
 * tokenizer_config.json (rendered with jinja2, encoded with tokenizers); and Ctrl-C. run.c's main
 * is another's here. */
int run_main(int argc, char **argv);
#define main run_main
#include "../run.c"
#undef main

#include <sys/wait.h>

#include "test.h"

/* One line of test/data/chat.jsonl: messages, and their ids by this tokenizer. */
static void check_ids(Tokenizer *tokenizer, const Json *json, const char *key) {
    Session s = {.path = key, .tokenizer = tokenizer};
    char *system = NULL;
    size_t bytes;
    int messages = json_get(json, 0, "messages"), n = 0;
    bool begun = false;
    for (int i = json_first(json, messages); i >= 0; i = json_next(json, messages, i)) {
        int role = json_get(json, i, "role");
        char *text = json_string(json, json_get(json, i, "content"), &bytes);
        if (json_is(json, role, "system")) {
            system = text;
            continue;
        }
        if (!begun) push_chat_start(&s, system);
        begun = true;
        if (json_is(json, role, "user")) {
            const char *message = trim(text, &bytes);
            push_turn(&s, message, bytes);
        } else { // an answer, as the model gives it
            int eot = special_token(&s, "<|eot_id|>");
            push_text(&s.queue, tokenizer, text, bytes, false);
            push(&s.queue, &eot, 1);
        }
        free(text);
    }
    int list = json_get(json, 0, key);
    for (int i = json_first(json, list); i >= 0; i = json_next(json, list, i), n++) {
        double id = -1;
        json_number(json, i, &id);
        check(n < s.queue.n && s.queue.ids[n] == id, "%s: id %d is not %.0f", key, n, id);
    }
    check(n > 10 && n == s.queue.n, "%s: %d ids, expected %d", key, s.queue.n, n);
    free(s.queue.ids);
    free(system);
}

static void test_template(const char *key, const char *path) {
    char name[100];
    bool llama3 = !strcmp(key, "llama3"); // tiny's tokenizer without what tells 3.1 from 3
    snprintf(name, sizeof name, "chat: the ids of LLaMA 3%s's template, tokenizer %s",
             llama3 ? "" : ".1", path);
    test_begin(name);
    size_t bytes;
    char *file = exists(path) ? read_file(path, &bytes) : NULL;
    if (!file) {
        test_skip("../shared/llama3.1 is not there");
        return;
    }
    for (char *p; llama3 && (p = strstr(file, "<|eom_id|>"));) memcpy(p, "<|not_id|>", 10);
    Tokenizer *tokenizer = tokenizer_load(path, file, bytes);
    free(file);
    file = read_file("test/data/chat.jsonl", &bytes);
    char *more = NULL;
    int lines = 0;
    for (char *line = strtok_r(file, "\n", &more); line; line = strtok_r(NULL, "\n", &more)) {
        Json *json = json_parse("test/data/chat.jsonl", line, strlen(line));
        check_ids(tokenizer, json, key);
        json_free(json);
        lines++;
    }
    check(lines == 4, "%d cases", lines);
    free(file);
    tokenizer_free(tokenizer);
}

/* ./run -m chat with pipes at its stdin, stdout and stderr. */
typedef struct {
    pid_t process;
    int to, from;
    FILE *messages;
} Chat;

static Chat start_chat(void) {
    int fd[3][2];
    for (int i = 0; i < 3; i++)
        if (pipe(fd[i])) die("pipe");
    Chat chat = {.process = fork()};
    if (chat.process == 0) {
        for (int i = 0; i < 3; i++) dup2(fd[i][i > 0], i);
        for (int i = 0; i < 6; i++) close(fd[i / 2][i % 2]);
        execl("./run", "run", "data/tiny", "-m", "chat", "-d", "cpu", "-s", "1", "-n", "100000",
              (char *)NULL);
        _exit(3);
    }
    for (int i = 0; i < 3; i++) close(fd[i][i > 0]);
    chat.to = fd[0][1];
    chat.from = fd[1][0];
    chat.messages = fdopen(fd[2][0], "r");
    if (!chat.messages) die("fdopen");
    return chat;
}

/* Ctrl-C in the midst of an answer. That it has ended shows when the next message, one that does
 * not fit, is refused; all of it is in the pipe by then. */
static void interrupt_answer(const Chat *chat, const char *message) {
    char text[1 << 16], *line = NULL;
    size_t size = 0;
    memset(text, ' ', 1 << 15);
    for (int i = 0; i < 1 << 15; i += 2) text[i] = 'x';
    text[(1 << 15) - 1] = '\n';
    check(write(chat->to, message, strlen(message)) > 0 &&
              read(chat->from, text + (1 << 15), 1) == 1,
          "no answer");
    kill(chat->process, SIGINT);
    check(write(chat->to, text, 1 << 15) == 1 << 15, "cannot be written");
    bool refused = false;
    while (!refused && getline(&line, &size, chat->messages) > 0)
        refused = strstr(line, "not sent");
    check(refused, "the chat ended");
    check(read(chat->from, text, sizeof text) > 0, "the answer does not end with a newline");
    free(line);
}

static void test_interrupt(void) {
    test_begin("chat: Ctrl-C ends each answer, and the chat goes on");
    Chat chat = start_chat();
    int status = 0;
    signal(SIGPIPE, SIG_IGN); // if it has ended, writing to it fails
    interrupt_answer(&chat, "Tell me a story\n");
    interrupt_answer(&chat, "And another one\n");
    close(chat.to); // no more messages: the chat ends by itself, with 1 as two were not sent
    waitpid(chat.process, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 1, "wait status %x", status);
    close(chat.from);
    fclose(chat.messages);
    signal(SIGPIPE, SIG_DFL);
}

/* A directory with data/tiny's model and these files beside it. */
static void make_chat_model(const char *name, const char *text) {
    shell("rm -rf build/test/chat && cp -r data/tiny build/test/chat");
    if (name) write_file(name, text, strlen(text));
}

/* The first tokens of a chat without a system prompt, as text. */
static char *chat_start(void) {
    Session s = {.path = "chat", .checkpoint = checkpoint_open("build/test/chat")};
    s.tokenizer = checkpoint_tokenizer(s.checkpoint);
    push_chat_start(&s, NULL);
    char *text = allocate(1, 1);
    for (int i = 0; i < s.queue.n; i++) {
        size_t bytes;
        const char *token = tokenizer_decode(s.tokenizer, s.queue.ids[i], &bytes);
        char *more = format_text("%s%.*s", text, (int)bytes, token);
        free(text);
        text = more;
    }
    free(s.queue.ids);
    tokenizer_free(s.tokenizer);
    checkpoint_close(s.checkpoint);
    return text;
}

static void test_templates(void) {
    static const char *const config = "build/test/chat/tokenizer_config.json";
    static const char *const jinja = "build/test/chat/chat_template.jinja";
    test_begin("chat: a template that is not LLaMA 3's is refused with its name");
    const char *refused[][3] = {
        {config, "{\"chat_template\": \"<|im_start|>\"}", "tokenizer_config.json"},
        {jinja, "{{ '[INST]' }}", "chat_template.jinja"},
        {config,
         "{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"<|start_header_id|>\"}, "
         "{\"name\": \"default\", \"template\": \"[INST]\"}]}",
         "tokenizer_config.json"}};
    for (int i = 0; i < 3; i++) {
        make_chat_model(refused[i][0], refused[i][1]);
        int status = shell("./run build/test/chat -d cpu -m chat -i hi 2>&1 >/dev/null");
        check(status == 1 && strstr(output, "is not LLaMA 3's") && strstr(output, refused[i][2]),
              "status %d: %s", status, output);
        status = shell("./run build/test/chat -d cpu -i hi -n 1");
        check(status == 0, "not a chat, and refused: %s", output);
    }
    test_begin(
        "chat: a template's dates: 3.1's, 3.2's today, none in Llama 3's; the jinja file counts");
    char today[2][32], *text;
    for (int i = 0; i < 4; i++) {
        make_chat_model(config, i == 3   ? "{\"chat_template\": \"[INST]\"}"
                                : i == 2 ? "{\"chat_template\": \"<|start_header_id|>\"}"
                                         : "{\"chat_template\": \"<|start_header_id|>Cutting "
                                           "Knowledge Date 26 Jul 2024\"}");
        const char *new = "<|start_header_id|>{{ strftime_now('%d') }}Cutting Knowledge Date";
        if (i == 1 || i == 3) write_file(jinja, new, strlen(new));
        time_t now = time(NULL);
        strftime(today[0], sizeof today[0], "%d %b %Y", localtime(&now));
        text = chat_start();
        now = time(NULL); // midnight may have passed
        strftime(today[1], sizeof today[1], "%d %b %Y", localtime(&now));
        bool right = i == 0   ? strstr(text, "Today Date: 26 Jul 2024\n\n") != NULL
                     : i == 2 ? !*text
                              : strstr(text, today[0]) || strstr(text, today[1]);
        check(right, "%d: %s", i, text);
        free(text);
    }
}

/* What a chat answers to a text of several lines equals what it answers to another. */
static void test_lines(void) {
    char whole[1 << 10];
    test_begin(
        "chat: CR LF ends a line, also after a backslash; a NUL and what is no UTF-8 is refused");
    shell(
        "printf 'Who are\\\n you?\n' | ./run data/tiny -m chat -d cpu -t 0 -n 9 2>&1 >&1 | grep -v "
        "tokens/s");
    snprintf(whole, sizeof whole, "%.1000s", output);
    shell(
        "printf 'Who are\\\r\n you?\r\n' | ./run data/tiny -m chat -d cpu -t 0 -n 9 2>&1 | grep -v "
        "tokens/s");
    check(strlen(whole) > 50 && !strcmp(output, whole), "%s%s", output, whole);
    const char *bad[] = {"Hi \\0 there", "Hi \\377"};
    for (int i = 0; i < 2; i++) {
        int status = shell("printf '%s\\n' | ./run data/tiny -m chat -d cpu -t 0 -n 9", bad[i]);
        check(status == 1 && strstr(output, "not a text: its byte 3"), "%d: %s", status, output);
    }
    test_begin("chat: -y @FILE is read as -i @FILE");
    write_file("build/test/system.txt", "Speak of ships.\r\n", 17);
    shell("./run data/tiny -m chat -d cpu -t 0 -n 9 -i hi -y 'Speak of ships.' 2>&1 | grep -v "
          "tokens/s");
    snprintf(whole, sizeof whole, "%.1000s", output);
    shell("./run data/tiny -m chat -d cpu -t 0 -n 9 -i hi -y @build/test/system.txt 2>&1 | grep -v "
          "tokens/s");
    check(strlen(whole) > 50 && !strcmp(output, whole), "%s%s", output, whole);
}

void test_chat_program(void) {
    test_templates();
    test_lines();
    test_template("tiny", "data/tiny/tokenizer.json");
    test_template("llama3", "data/tiny/tokenizer.json");
    test_template("llama3.1", "../shared/llama3.1/tokenizer.json");
    test_interrupt();

    test_begin("chat: a backslash goes on, what does not fit is not sent, help and version");
    char whole[200];
    shell("./run data/tiny -m chat -d cpu -t 0 -n 9 -i \"$(printf 'Who are\\n you?')\" </dev/null "
          "2>/dev/null");
    snprintf(whole, sizeof whole, "%.199s", output);
    shell("printf 'Who are\\\\\\n you?\\n' | ./run data/tiny -m chat -d cpu -t 0 -n 9 2>/dev/null");
    check(strlen(whole) > 5 && !strcmp(output, whole), "%s%s", output, whole);
    int status = shell("printf 'Hello there, how do you do?\\nHi\\n' | ./run data/tiny -m chat -d "
                       "cpu -t 0 -n 2 -l 62");
    check(status == 1 && strstr(output, "not sent: \"Hello there, how do you do?\" makes") &&
              strstr(output, "generation 2 tokens"),
          "status %d: %s", status, output);
    const char *programs[] = {"$RUN", "$QUANTIZE"};
    for (int i = 0; i < 2; i++) {
        check(shell("%s --help", programs[i]) == 0 && !strncmp(output, "usage: ", 7), "%s", output);
        check(shell("%s --version", programs[i]) == 0 && strstr(output, " 1.0\n"), "%s", output);
        check(shell("%s -h >/dev/full", programs[i]) == 1 && strstr(output, "No space"), "%s",
              output);
    }
}
