"""One folder per operation; inside it the file name says who is spoken to."""
