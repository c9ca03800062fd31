"""What players came to: figures with intervals, sentences, tables and pictures. Free of torch."""
