"""The decoder of Llama and Mistral, and its layout on a mesh."""
