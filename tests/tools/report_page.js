// Appended to a report by report_page.sh: what a person would see amiss, as lines at the end of the page.
const found = [];
const near = (node) => node.textContent.trim().slice(0, 60);
const texts = []; // every piece of text, with the rectangles that it fills
for (const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); walk.nextNode();) {
  const parent = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || parent.closest("script, title")) continue;
  const range = document.createRange();
  range.selectNodeContents(walk.currentNode);
  for (const box of range.getClientRects())
    if (box.width > 0) texts.push({box, parent, node: walk.currentNode});
}
const amount = (low, high, other_low, other_high) => Math.min(high, other_high) - Math.max(low, other_low);
for (let i = 0; i < texts.length; ++i)
  for (let j = i + 1; j < texts.length; ++j) {
    const a = texts[i], b = texts[j];
    if (a.node !== b.node && amount(a.box.left, a.box.right, b.box.left, b.box.right) > 1 &&
        amount(a.box.top, a.box.bottom, b.box.top, b.box.bottom) > 3)
      found.push(`overlap: '${near(a.node)}' and '${near(b.node)}'`);
  }
for (const {node} of new Map(texts.map((text) => [text.node, text])).values())
  for (const word of node.textContent.matchAll(/\S+/g)) {
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
    if (word[0].length <= 12 && lines.size > 1 && !/[-/]/.test(word[0])) found.push(`a short word is broken: '${word[0]}'`);
  }
if (document.documentElement.scrollWidth > innerWidth)
  found.push(`overflow: the page is ${document.documentElement.scrollWidth} wide, the window ${innerWidth}`);
for (const {box, parent, node} of texts) {
  const frame = (parent.closest("svg") ?? document.body).getBoundingClientRect();
  if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push(`overflow: '${near(node)}'`);
}
for (const mark of document.querySelectorAll("svg line, svg rect, svg circle")) {
  const box = mark.getBoundingClientRect(), frame = mark.ownerSVGElement.getBoundingClientRect();
  if (box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
    found.push(`outside of its picture: ${mark.outerHTML}`);
}
// Letters against the page: WCAG's contrast.
const light = (color) => color.match(/[\d.]+/g).slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const paper = light(getComputedStyle(document.body).backgroundColor);
for (const {parent, node} of texts) {
  const style = getComputedStyle(parent), ink = light(parent.closest("svg") ? style.fill : style.color);
  const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  if (contrast < 4.5) found.push(`faint, ${contrast.toFixed(1)}: '${near(node)}'`);
}
const lines = [...document.querySelectorAll("td.variant")].map((cell) => `row ${cell.textContent}`);
lines.push(`scheme ${paper > 0.5 ? "light" : "dark"} width ${innerWidth} texts ${texts.length}`);
lines.push(`roofs ${document.querySelectorAll("figure svg").length} points ${document.querySelectorAll("circle").length}`);
lines.push(...found.map((what) => `amiss ${what}`), "end");
document.body.insertAdjacentHTML("beforeend", "<pre></pre>");
document.body.lastChild.textContent = lines.map((line) => `\n@ ${line}`).join("");
