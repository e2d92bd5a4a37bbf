// transformer.h - the whole network, forward and backward, on a session's buffers.
#ifndef GGD_TRANSFORMER_H
#define GGD_TRANSFORMER_H

#include "session.h"

// The adapter's pairs into the session's (layer, target) table.
void ggd_bind_adapter(ggd_session *session, const ggd_adapter *adapter);

// Tokens to the last layer's residual stream, (M, C) float32 with row stride session->ld_hidden.
const float *ggd_transformer_forward(ggd_session *session, const ggd_batch *batch, const ggd_adapter *adapter);

// From d loss / d (last residual stream) in buffers.dx down to the input embeddings; adds into the adapter's gradients.
void ggd_transformer_backward(ggd_session *session, const ggd_batch *batch, const ggd_adapter *adapter, float *grad_offset);

ggd_head ggd_transformer_head(const ggd_session *session, const ggd_adapter *adapter);

#endif
