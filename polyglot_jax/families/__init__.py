"""What other libraries call things: one module of plain data per architecture, no code paths."""
