"""A local HTTP server: what clients of OpenAI and of llama-server send, answered by denoising."""
