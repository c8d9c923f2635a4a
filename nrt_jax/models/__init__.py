"""The decoder of Llama and Mistral, and how it lies on a mesh."""
