// ggd.h - the whole public C API of the ggml-diffusion core: a frozen, quantised, autoregressive transformer in a GGUF file, run
// forward and backward under a fractional causal mask with LoRA deltas.
//
// Letters: B sequences, M rows (all tokens of a batch, sequence after sequence, no padding), C hidden size, H query heads, G key/value
// heads, D head size, F feed-forward size, V vocabulary, R LoRA rank, L layers. Matrices are row-major.
//
// Ownership: handles are created and freed here; every array in a struct belongs to the caller and must outlive the call only.
// Threads: a model is immutable and may be shared; a session is used by one caller at a time and runs on its own worker threads.
// Failure: functions that return int give 0 on success and -1 on failure; ggd_last_error() then holds one line, per thread.
//
// Not here: tokenisation, time embedding, noise, optimizer, file export (Python), any other device.
#ifndef GGD_H
#define GGD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */
typedef struct ggd_model ggd_model;
typedef struct ggd_session ggd_session;
typedef struct ggd_context ggd_context;

typedef struct {
    int32_t n_layers;           // L
    int32_t hidden_size;        // C
    int32_t n_heads;            // H
    int32_t n_kv_heads;         // G
    int32_t head_size;          // D
    int32_t feed_forward_size;  // F
    int32_t vocab_size;         // V
    int32_t context_length;     // tokens
    int32_t tied_head;          // 1: the head reads the token embedding's rows
} ggd_shape;

// Fast: products in bfloat16, where the processor multiplies them and the weights are quantised; sums are float32 always.
enum { GGD_COMPUTE_FAST = 0, GGD_COMPUTE_F32 = 1 };

// Products of the frozen weights that go in int8, beside either element type of fast sessions: none; the input gradients, both operands in blocks of 64 with their own scales; or also
// the forward's, in the weights' own blocks and blocks of 32 activations.
enum { GGD_INT8_NONE = 0, GGD_INT8_BACKWARD = 1, GGD_INT8_BOTH = 2 };

// What the forward of a training step keeps for its backward; the gradients are identical.
enum {
    GGD_KEEP_ALL = 0,          // every activation
    GGD_KEEP_WITHOUT_FFN = 1,  // gate and up are computed again
    GGD_KEEP_BOUNDARIES = 2    // only each layer's input; the layer is computed again
};

enum { GGD_ATTN_Q = 0, GGD_ATTN_K = 1, GGD_ATTN_V = 2, GGD_ATTN_OUTPUT = 3, GGD_FFN_GATE = 4, GGD_FFN_UP = 5, GGD_FFN_DOWN = 6 };

typedef struct {
    int32_t n_threads;  // >= 1
    int32_t compute;    // GGD_COMPUTE_*
    int32_t use_simd;   // 0: the naive reference kernels
    int32_t keep;       // GGD_KEEP_*
} ggd_session_options;

// A run of rows that attend to each other: a sequence, one document of a packed sequence, a block, the holes of a text. Its rows also
// attend to some rows of a context, but for one at a row's own position: the row stands in its place.
typedef struct {
    int32_t first_row;       // into the batch's rows
    int32_t n_rows;          // >= 1
    int32_t sequence;        // row of embedding_offset
    int32_t first_position;  // the run's place in its sequence, for the Bernoulli mask's pattern
    int32_t n_positions;     // length of the text that its rows have their positions in, at most the context length
    int32_t first_context;   // into the context's rows, whose positions rise
    int32_t n_context;       // 0 without a context
} ggd_segment;

typedef struct {
    int32_t n_rows;              // M
    const int32_t *tokens;       // (M)
    const int32_t *positions;    // (M), rising in a segment; NULL: 0, 1, 2 ... in each
    const ggd_context *context;  // what the segments see beside their own rows, or NULL
    int32_t n_segments;
    const ggd_segment *segments;    // in row order, without gaps
    int32_t n_sequences;            // B
    const float *embedding_offset;  // (B, C) added to every token row of the sequence, or NULL
    float causal_ratio;             // 1 fully causal ... 0 bidirectional
    int32_t attention_sink;         // 1: a document's first row sees itself alone at any causal ratio
    int32_t bernoulli;              // 1: future keys are visible with probability 1 - causal_ratio instead of weighted by it
    uint64_t bernoulli_seed;
} ggd_batch;

// W x + scale * B (A x) on one projection of one layer.
typedef struct {
    int32_t layer;
    int32_t target;  // GGD_ATTN_Q ...
    int32_t rank;    // R
    float scale;     // alpha / R
    const float *a;  // (R, in)
    const float *b;  // (out, R)
    float *grad_a;   // (R, in), added to; NULL without gradients
    float *grad_b;   // (out, R), added to
} ggd_lora_pair;

typedef struct {
    int32_t n_pairs;
    const ggd_lora_pair *pairs;
    int32_t mask_token_id;        // -1: none
    const float *mask_embedding;  // (C) added to the row of mask_token_id, or NULL
    float *grad_mask_embedding;   // (C), added to; or NULL
} ggd_adapter;

// Weighted cross-entropy, indexed by the row whose hidden state predicts. The mask token's logit is -inf. With a teacher, the
// cross-entropy to the base's own distribution is a second loss: the base alone, causal, reads teacher_tokens in the same segments.
typedef struct {
    const int32_t *targets;         // (M)
    const float *weights;           // (M), 0: the row does not count
    float *row_loss;                // (M) out: cross-entropy in nats, 0 where the row has no weight
    uint8_t *row_correct;           // (M) out: 1 where the most probable token is the target
    double loss;                    // out: sum of weights * cross-entropy
    const int32_t *teacher_tokens;  // (M), or NULL: no teacher
    const int32_t *teacher_rows;    // (M): the teacher's row that predicts the same token
    const float *teacher_weights;   // (M), 0: the row has no teacher
    double teacher_loss;            // out: sum of teacher_weights * -sum_v p_teacher(v) log p(v)
} ggd_objective;

const char *ggd_last_error(void);
// "ggml version" that the core was compiled against is checked by the caller: the version of the library in the process.
const char *ggd_ggml_version(void);
// Memory that another library has mapped a file to: from now on a read past an end that the file has come to have ends the process with
// one line and exit code 2, as it does for this library's own maps. Forget it before it is unmapped.
void ggd_bus_watch(const void *data, size_t bytes, const char *path);
void ggd_bus_forget(const void *data);
// Comma-separated kernel sets that this machine can run, fastest first.
const char *ggd_kernel_sets(void);

// A type of tensors that a model may have, by ggml's number of it.
typedef struct {
    const char *name;     // as ggml writes it, "q4_K"
    int32_t block;        // elements of a block
    int32_t bytes_block;  // bytes of a block
    int32_t own_kernels;  // 0: unpacked by ggml, which is slower
} ggd_tensor_type_info;
// -1 where the type is not supported; then only the name says anything, if there is one.
int ggd_tensor_type(int32_t id, ggd_tensor_type_info *info);

// The table of architectures, a row of settings each, as text; NULL past the last.
const char *ggd_arch_row(int32_t index);

// One GGUF file, or the parts of one in their order.
int ggd_model_load(const char *const *paths, int32_t n_paths, ggd_model **model);
void ggd_model_free(ggd_model *model);
void ggd_model_shape(const ggd_model *model, ggd_shape *shape);
// Rows of the token embedding as the file has them, (n_tokens, C); what is added to them is added before the model scales them.
int ggd_model_embed(const ggd_model *model, int32_t n_tokens, const int32_t *tokens, float *rows);

// What another engine needs of a model. Pointers lead into the model and live as long as it does; what it lacks is NULL, zero or one.
typedef struct {
    const void *data;   // packed rows, one after the other, inside of a mapped file
    int32_t type;       // ggml's number of it
    int32_t part;       // the file that they lie in
    int32_t n_rows;     // out
    int32_t n_cols;     // in
    const float *bias;  // (n_rows)
} ggd_weight;

typedef struct {
    ggd_weight projections[7];  // indexed by GGD_ATTN_Q ...
    const float *norms[6];      // of the attention block's input and output, of the feed-forward block's, (C); of Q and K
    int32_t rope;               // which of the model's; -1: none
    int32_t window;             // a query sees keys that are nearer than this, on both sides; 0: all
} ggd_layer_weights;

typedef struct {
    float rms_eps;
    int32_t rope_halves;  // 1: RoPE turns one element of each half together; 0: neighbours
    int32_t n_rotated;    // elements of a head that RoPE turns
    const float
        *frequencies[3];  // (n_rotated / 2) radians a position: of most layers, of those with a window, and of long sequences
    float magnitudes[3];  // what cosine and sine are multiplied by
    int32_t original_context;      // tokens; longer sequences are long
    int32_t gelu_gate;             // 1: the gate goes through GELU; 0: through SiLU
    int32_t wide_head_norms;       // 1: the norms of Q and K run over all heads of a row together
    float embedding_scale;         // of token rows with all that is added to them
    float residual_scale;          // of what a block adds
    float score_scale, score_cap;  // scores are score_scale q k, then soft-capped
    float logit_cap;
    float temperature;         // queries grow by temperature * log(1 + whole original contexts before them)
    ggd_weight head;           // (V, C)
    const float *output_norm;  // (C), times what logits are scaled by
} ggd_network;

void ggd_model_network(const ggd_model *model, ggd_network *network);
int ggd_model_layer(const ggd_model *model, int32_t layer, ggd_layer_weights *weights);
// The memory of a mapped file.
int ggd_model_part(const ggd_model *model, int32_t part, const void **data, size_t *bytes);

int ggd_session_create(const ggd_model *model, const ggd_session_options *options, ggd_session **session);
void ggd_session_free(ggd_session *session);
// Name of the kernel set in use.
const char *ggd_session_kernels(const ggd_session *session);
// Element type of its matrix products, "bfloat16" or "float32".
const char *ggd_session_element(const ggd_session *session);
// Which products of the frozen weights go in int8, GGD_INT8_*; the rest in the session's element type. Fails where the kernels have no
// int8 products, or where the session was asked for float32 or has to compute so for its float weights.
int ggd_session_set_int8(ggd_session *session, int32_t products);
int32_t ggd_session_int8(const ggd_session *session);
typedef struct {
    int32_t n_rows;
    int32_t max_keys;       // of a segment: its own rows and those of its context
    int32_t max_positions;  // of a segment
    int32_t max_rank;       // of LoRA pairs
} ggd_call_size;
// Bytes that a call of a size would take, with or without gradients and teacher, under a policy GGD_KEEP_*.
int ggd_session_plan(const ggd_session *session, const ggd_call_size *size, int32_t gradients, int32_t teacher, int32_t keep,
                     size_t *bytes);
// Policy of the calls that follow; the arena is laid out anew when it changes.
void ggd_session_set_keep(ggd_session *session, int32_t keep);
// Packs an adapter's pairs once for all forward passes that name them until another one is held or NULL; their arrays do not change
// meanwhile. Bytes beside the arrays: about half of theirs in bfloat16.
int ggd_session_hold(ggd_session *session, const ggd_adapter *adapter);
// Holds this adapter no longer, if it is the one.
void ggd_session_release(ggd_session *session, const ggd_adapter *adapter);
// Seconds that the session's calls spent in a part of the work since it was created or reset; NULL past the last part. The rest of a
// call's time is not parallel.
const char *ggd_session_part(const ggd_session *session, int32_t index, double *time_s);
void ggd_session_reset_parts(ggd_session *session);
// Billions of operations a second of the tile kernel on operands that stay in the first-level cache, all threads: what a matrix product
// could reach at most.
double ggd_session_peak(ggd_session *session, double time_s);
// Billions of weights a second that are packed for products, all threads, in passes over all layers' frozen weights: for the forward, or
// across the rows for the input gradients; in int8 where the session's products are. 0 where the memory is missing.
double ggd_session_packing(ggd_session *session, int32_t backward, double time_s);

// Keys and values of rows that the base alone has computed, each row from itself and rows before it. Rows that stand stay as they are, so
// calls that follow need not compute them again. A context belongs to its model; calls with one session's contexts take turns as its other calls.
enum { GGD_CONTEXT_F32 = 0, GGD_CONTEXT_BF16 = 1, GGD_CONTEXT_Q8_0 = 2 };
// Bytes of a context of n_rows; -1 where the type does not go with the model's heads.
int ggd_context_plan(const ggd_model *model, int32_t type, int32_t n_rows, size_t *bytes);
int ggd_context_create(const ggd_model *model, int32_t type, int32_t n_rows, ggd_context **context);
void ggd_context_free(ggd_context *context);
int32_t ggd_context_rows(const ggd_context *context);
// Forgets all rows from n_rows on.
void ggd_context_truncate(ggd_context *context, int32_t n_rows);
// Computes rows with the base alone, causally, and appends them; the batch names the same context where its segments see rows that are there
// already. Raw logits of chosen rows, (n_select, V).
int ggd_context_extend(ggd_session *session, ggd_context *context, const ggd_batch *batch, int32_t n_select, const int32_t *rows,
                       float *logits);
// Computes one whole sequence with an adapter under the batch's own mask, and keeps keys and values of chosen rows (rising) in the place of
// all that the context held: what rows that are computed again later see of the others, as it was now. Raw logits as above.
int ggd_context_refill(ggd_session *session, ggd_context *context, const ggd_batch *batch, const ggd_adapter *adapter,
                       int32_t n_kept, const int32_t *kept, int32_t n_select, const int32_t *rows, float *logits);

// Raw logits of chosen rows, (n_select, V).
int ggd_logits(ggd_session *session, const ggd_batch *batch, const ggd_adapter *adapter, int32_t n_select, const int32_t *rows,
               float *logits);
int ggd_loss(ggd_session *session, const ggd_batch *batch, const ggd_adapter *adapter, ggd_objective *objective);
// Adds into the adapter's gradients; grad_offset is (B, C), assigned, or NULL.
int ggd_loss_and_gradients(ggd_session *session, const ggd_batch *batch, const ggd_adapter *adapter, ggd_objective *objective,
                           float *grad_offset);
/* cffi: end */

#ifdef __cplusplus
}
#endif
#endif
