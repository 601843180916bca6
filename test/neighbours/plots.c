/* plots DIRECTORY: pictures from the CSV files there, as SVG beside them.
 *
 *   bench_gemm.csv         (make bench)               speedup.svg
 *   analysis-linears.csv   (neighbours -v analysis)   error.svg
 *   analysis-channels.csv                             activations.svg, weights.svg
 *
 * One function draws them all: lines from columns of a CSV. */
#define _GNU_SOURCE
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SERIES = 4, MAX_COLUMNS = 32, MAX_FILTERS = 3 };

static void fail(const char *what, const char *name) {
    fprintf(stderr, "error: %s: %s\n", name, what);
    exit(1);
}

typedef struct {
    char *text;
    char *(*cells)[MAX_COLUMNS]; // [n][columns] the header first; they point into the text
    int n;
} Csv;

/* Reads a CSV without quotes; lines that start with # are comments. n = 0 if there is no file. */
static Csv csv_read(const char *path) {
    Csv csv = {0};
    FILE *file = fopen(path, "r");
    if (!file) return csv;
    size_t size = 0;
    if (getdelim(&csv.text, &size, 0, file) < 0) fail("it is empty", path);
    fclose(file);
    for (char *rest = csv.text, *line; (line = strsep(&rest, "\n"));) {
        if (!*line || *line == '#') continue;
        csv.cells = realloc(csv.cells, (csv.n + 1) * sizeof *csv.cells);
        if (!csv.cells) fail("out of memory", path);
        memset(csv.cells[csv.n], 0, sizeof *csv.cells);
        for (int i = 0; line && i < MAX_COLUMNS; i++) csv.cells[csv.n][i] = strsep(&line, ",");
        csv.n++;
    }
    return csv;
}

static void csv_free(Csv *csv) {
    free(csv->text);
    free(csv->cells);
}

/* The cell of a row in the column of that name. */
static const char *cell(const Csv *csv, int row, const char *column) {
    int i = 0;
    while (i < MAX_COLUMNS && csv->cells[0][i] && strcmp(csv->cells[0][i], column)) i++;
    if (i == MAX_COLUMNS || !csv->cells[row][i]) fail("no such column in every row", column);
    return csv->cells[row][i];
}

typedef struct {
    const char *label, *color;
    const char *y;                       // the column; with `over`, over / y is drawn
    const char *over;                    //
    const char *filters[MAX_FILTERS][2]; // column and the text that it must be
} Series;

typedef struct {
    const char *title, *subtitle, *x_label, *y_label;
    const char *x;     // the column; NULL: the number of the point
    const char *order; // with x NULL: the column by which points are sorted, the largest first
    bool log2_x, log_y, marks;
    bool one; // a line at y = 1
    Series series[MAX_SERIES];
} Chart;

typedef struct {
    double (*points)[3]; // x, y, and what they are sorted by
    int n;
} Line;

static int by_order(const void *a, const void *b) {
    double x = ((const double *)a)[2], y = ((const double *)b)[2];
    return (x < y) - (x > y);
}

/* The points of a series. */
static Line line_of(const Csv *csv, const Chart *chart, const Series *s) {
    Line line = {calloc(csv->n, sizeof *line.points), 0};
    if (!line.points) fail("out of memory", s->label);
    for (int row = 1; row < csv->n; row++) {
        bool wanted = true;
        for (int i = 0; i < MAX_FILTERS && s->filters[i][0]; i++)
            wanted = wanted && !strcmp(cell(csv, row, s->filters[i][0]), s->filters[i][1]);
        if (!wanted) continue;
        double y = atof(cell(csv, row, s->y));
        line.points[line.n][0] = chart->x ? atof(cell(csv, row, chart->x)) : line.n;
        line.points[line.n][2] = chart->order ? atof(cell(csv, row, chart->order)) : -line.n;
        line.points[line.n++][1] = s->over ? atof(cell(csv, row, s->over)) / y : y;
    }
    if (!line.n) fail("no row of the CSV is of this line", s->label);
    if (!chart->x) {
        qsort(line.points, line.n, sizeof *line.points, by_order);
        for (int i = 0; i < line.n; i++) line.points[i][0] = i;
    }
    return line;
}

/* An axis: values low..high on pixels from..to, with a tick every `step` (as a factor, if log). */
typedef struct {
    double low, high, step, from, to;
    bool log;
} Axis;

static double place(const Axis *a, double value) {
    double share = a->log ? log(value / a->low) / log(a->high / a->low)
                          : (value - a->low) / (a->high - a->low);
    return a->from + share * (a->to - a->from);
}

/* Covers low..high with ticks at 1, 2 or 5 times a power of ten; or, if log, at powers of `base`.
 */
static Axis axis_of(double low, double high, double base, double from, double to) {
    Axis a = {.from = from, .to = to, .log = base > 0};
    if (a.log) {
        double first = floor(log(low) / log(base) + 1e-9),
               last = ceil(log(high) / log(base) - 1e-9);
        a.low = pow(base, first);
        a.high = pow(base, last > first ? last : first + 1);
        a.step = base;
        return a;
    }
    double rough = (high - low) / 6, power = pow(10, floor(log10(rough)));
    a.step = power * (rough / power > 5 ? 10 : rough / power > 2 ? 5 : rough / power > 1 ? 2 : 1);
    a.low = floor(low / a.step + 1e-9) * a.step;
    a.high = ceil(high / a.step - 1e-9) * a.step;
    return a;
}

enum { WIDTH = 760, HEIGHT = 420, LEFT = 70, RIGHT = 730, TOP = 96, BOTTOM = 360 };

static void put_text(FILE *out, double x, double y, const char *anchor, const char *style,
                     const char *text) {
    fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" %s>%s</text>\n", x, y, anchor,
            style, text);
}

static void put_line(FILE *out, double x0, double y0, double x1, double y1, const char *style) {
    fprintf(out, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x0, y0, x1, y1,
            style);
}

/* Grid lines and numbers of both axes. */
static void put_axes(FILE *out, const Chart *chart, const Axis axes[2]) {
    for (int is_y = 0; is_y < 2; is_y++) {
        const Axis *a = &axes[is_y];
        for (int i = 0;; i++) {
            double value = a->log ? a->low * pow(a->step, i) : a->low + i * a->step;
            if (value > a->high * (1 + 1e-9) + 1e-12) break;
            double at = place(a, value);
            char number[32];
            snprintf(number, sizeof number, "%g", fabs(value) < 1e-12 ? 0 : value);
            if (is_y) {
                put_line(out, LEFT, at, RIGHT, at, "stroke=\"#e4e4e4\"");
                put_text(out, LEFT - 8, at + 4, "end", "fill=\"#555\"", number);
            } else {
                put_line(out, at, BOTTOM, at, BOTTOM + 5, "stroke=\"#888\"");
                put_text(out, at, BOTTOM + 20, "middle", "fill=\"#555\"", number);
            }
        }
    }
    if (chart->one) {
        double at = place(&axes[1], 1);
        put_line(out, LEFT, at, RIGHT, at, "stroke=\"#888\" stroke-dasharray=\"4 4\"");
    }
    put_line(out, LEFT, BOTTOM, RIGHT, BOTTOM, "stroke=\"#888\"");
    put_text(out, (LEFT + RIGHT) / 2.0, BOTTOM + 44, "middle", "fill=\"#333\"", chart->x_label);
    fprintf(out,
            "<text transform=\"translate(20 %d) rotate(-90)\" text-anchor=\"middle\" "
            "fill=\"#333\">%s</text>\n",
            (TOP + BOTTOM) / 2, chart->y_label);
}

static void draw(const char *path, const Csv *csv, const Chart *chart) {
    Line lines[MAX_SERIES];
    int n = 0;
    double low[2] = {INFINITY, INFINITY}, high[2] = {-INFINITY, -INFINITY};
    for (; n < MAX_SERIES && chart->series[n].y; n++) {
        lines[n] = line_of(csv, chart, &chart->series[n]);
        for (int i = 0; i < lines[n].n; i++)
            for (int k = 0; k < 2; k++) {
                low[k] = fmin(low[k], lines[n].points[i][k]);
                high[k] = fmax(high[k], lines[n].points[i][k]);
            }
    }
    if (!chart->log_y && low[1] > 0) low[1] = 0; // heights compare only from zero
    double base = high[1] / low[1] > 100 ? 10 : 2;
    Axis axes[2] = {axis_of(low[0], high[0], chart->log2_x ? 2 : 0, LEFT, RIGHT),
                    axis_of(low[1], high[1], chart->log_y ? base : 0, BOTTOM, TOP)};
    if (!chart->log2_x) axes[0].low = low[0], axes[0].high = high[0];

    FILE *out = fopen(path, "w");
    if (!out) fail("it cannot be written", path);
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
            "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\">\n"
            "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
            WIDTH, HEIGHT);
    put_text(out, LEFT, 30, "start", "font-size=\"17\" font-weight=\"bold\" fill=\"#222\"",
             chart->title);
    put_text(out, LEFT, 50, "start", "fill=\"#555\"", chart->subtitle);
    put_axes(out, chart, axes);
    double legend = LEFT;
    for (int k = 0; k < n; k++) {
        const Series *s = &chart->series[k];
        fprintf(
            out,
            "<path fill=\"none\" stroke=\"%s\" stroke-width=\"%s\" stroke-linejoin=\"round\" d=\"",
            s->color, chart->marks ? "2.2" : "1.3");
        for (int i = 0; i < lines[k].n; i++)
            fprintf(out, "%c%.1f %.1f", i ? 'L' : 'M', place(&axes[0], lines[k].points[i][0]),
                    place(&axes[1], lines[k].points[i][1]));
        fprintf(out, "\"/>\n");
        for (int i = 0; i < lines[k].n && chart->marks; i++)
            fprintf(out,
                    "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\" stroke=\"#fff\"/>\n",
                    place(&axes[0], lines[k].points[i][0]), place(&axes[1], lines[k].points[i][1]),
                    s->color);
        char style[64];
        snprintf(style, sizeof style, "stroke=\"%s\" stroke-width=\"3\"", s->color);
        put_line(out, legend, 70, legend + 22, 70, style);
        put_text(out, legend + 28, 74, "start", "fill=\"#333\"", s->label);
        legend += (RIGHT - LEFT) / (double)MAX_SERIES;
        free(lines[k].points);
    }
    fprintf(out, "</svg>\n");
    if (fclose(out)) fail("it cannot be written", path);
    printf("%s\n", path);
}

#define BLUE "#0072b2"
#define ORANGE "#d55e00"
#define GREEN "#009e73"
#define YELLOW "#e69f00"
#define NEAREST "W4A8 g128 to nearest"
#define METHOD "W4A8 g128 +GPTQ +ranges +smoothing"

static const Chart speedup = {
    .title = "W4A8 GEMM: times faster than cuBLAS FP16",
    .subtitle = "y = x W\u1d40, N = 8192, K = 21760",
    .x_label = "M, tokens",
    .y_label = "speed-up",
    .x = "M",
    .log2_x = true,
    .marks = true,
    .one = true,
    .series = {
        {"per channel", BLUE, "channel_us", "cublas_f16_us", {{"shape", "paper"}, {"graph", "0"}}},
        {"groups of 128",
         ORANGE,
         "g128_us",
         "cublas_f16_us",
         {{"shape", "paper"}, {"graph", "0"}}}}};

static const Chart error = {
    .title = "What attention and FFN add to the residual stream",
    .subtitle = "W4A8 g128, not rotated, against the float model: higher is better",
    .x_label = "layer",
    .y_label = "signal to noise, dB",
    .x = "layer",
    .marks = true,
    .series = {
        {"attention, QQQ",
         BLUE,
         "y_sqnr_db",
         NULL,
         {{"setting", METHOD}, {"linear", "self_attn.o_proj"}}},
        {"FFN, QQQ", GREEN, "y_sqnr_db", NULL, {{"setting", METHOD}, {"linear", "mlp.down_proj"}}},
        {"attention, to nearest",
         ORANGE,
         "y_sqnr_db",
         NULL,
         {{"setting", NEAREST}, {"linear", "self_attn.o_proj"}}},
        {"FFN, to nearest",
         YELLOW,
         "y_sqnr_db",
         NULL,
         {{"setting", NEAREST}, {"linear", "mlp.down_proj"}}}}};

static const Chart activations = {
    .title = "Adaptive smoothing: the input of q, k and v",
    .subtitle =
        "largest magnitude of each channel over 2047 tokens, all but the first; first layer",
    .x_label = "channel, the largest first",
    .y_label = "max |x|",
    .order = "x_max_before",
    .log_y = true,
    .series = {{"before",
                ORANGE,
                "x_max_before",
                NULL,
                {{"setting", METHOD}, {"layer", "0"}, {"linear", "self_attn.q_proj"}}},
               {"after",
                BLUE,
                "x_max_after",
                NULL,
                {{"setting", METHOD}, {"layer", "0"}, {"linear", "self_attn.q_proj"}}}}};

static const Chart weights = {
    .title = "... and where it goes: the weights of q",
    .subtitle = "largest magnitude of each input channel, first layer",
    .x_label = "channel, the largest first",
    .y_label = "max |w|",
    .order = "w_max_before",
    .log_y = true,
    .series = {{"before",
                ORANGE,
                "w_max_before",
                NULL,
                {{"setting", METHOD}, {"layer", "0"}, {"linear", "self_attn.q_proj"}}},
               {"after, quantized",
                BLUE,
                "w_max_after",
                NULL,
                {{"setting", METHOD}, {"layer", "0"}, {"linear", "self_attn.q_proj"}}}}};

int main(int argc, char **argv) {
    static const struct {
        const char *csv, *svg;
        const Chart *chart;
    } pictures[] = {{"bench_gemm.csv", "speedup.svg", &speedup},
                    {"analysis-linears.csv", "error.svg", &error},
                    {"analysis-channels.csv", "activations.svg", &activations},
                    {"analysis-channels.csv", "weights.svg", &weights}};
    if (argc != 2) return fputs("usage: plots DIRECTORY, which holds the CSV files\n", stderr), 2;
    for (size_t i = 0; i < sizeof pictures / sizeof *pictures; i++) {
        char from[4096], to[4096];
        snprintf(from, sizeof from, "%s/%s", argv[1], pictures[i].csv);
        snprintf(to, sizeof to, "%s/%s", argv[1], pictures[i].svg);
        Csv csv = csv_read(from);
        if (csv.n) draw(to, &csv, pictures[i].chart);
        else printf("%s is not there: no %s\n", from, pictures[i].svg);
        csv_free(&csv);
    }
    return 0;
}
