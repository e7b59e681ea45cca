// A real kernel module that compiles in seconds: exports a symbol, uses some of the kernel's.
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/pci.h>

int toy_answer(void);
int toy_answer(void)
{
	return 42;
}
EXPORT_SYMBOL_GPL(toy_answer);

static int __init toy_init(void)
{
	pr_info("toy: the answer is %d\n", toy_answer());
	return 0;
}

static void __exit toy_exit(void)
{
	pr_info("toy: gone, %d PCI devices seen\n", pci_num_vf(NULL));
}

module_init(toy_init);
module_exit(toy_exit);
MODULE_DESCRIPTION("toy module of imgbuild's tests");
MODULE_LICENSE("GPL");
MODULE_VERSION("1.0");
