/* The loop of norm.c, which every other kernel is given when it is loaded: one pool of threads serves
   all of them. */

#ifndef SUANLI_LOOP
#define SUANLI_LOOP

/* Calls work(context, item) for each item below the count: (count, threads, work, context). */
typedef void (*loop_over)(long, int, void (*)(void *, long), void *);

static loop_over for_all;

void suanli_use_loop(loop_over given) { for_all = given; }

#endif
